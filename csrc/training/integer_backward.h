// The products with base weights of a backward pass (backward_pass.h) by int8 kernels, for weights that are integers
// with one scale a row: rows of dout by pair, for down, and of dg and du, stacked, for gate and up.
#pragma once

#include "training/integer_transposed_gemm.h"

namespace kt {

class IntegerBackward {
 public:
  using Strip = TransposedGemm::Strip;
  // Scales of gate's and up's rows, of a strip of intermediate columns.
  struct InnerScales {
    static constexpr int kColumns = TransposedGemm::kMostStripPanels * kPanelRows;
    float gate[kColumns];
    float up[kColumns];
  };

  // `kernels`: those of the forward pass.
  static bool serves(const ExpertWeights& weights, const PerProjection<const KernelSet*>& kernels) {
    return std::all_of(kProjections.begin(), kProjections.end(), [&](Projection which) {
      return kernels[which]->activation == Activation::kInt8 && IntegerTransposedGemm::serves(weights, which);
    });
  }
  IntegerBackward(Engine& engine, const ExpertWeights& weights, const Routing& routing);

  // Rows of dout, fp32 `stride` apart, of pairs [first, +count) of an expert.
  void prepare_output(WorkerScratch& scratch, int expert, int first, int count, const float* rows, size_t stride) const;
  // dg and du of a pair, columns of the strip.
  InnerScales inner_scales(int expert, const Strip& strip) const;
  void prepare_inner(int pair, const Strip& strip, const InnerScales& scales, const float* gate, const float* up) const;

  int inner_strip_panels() const { return down_.strip_panels(); }
  int hidden_strip_panels() const { return gate_up_.strip_panels(); }
  // dout Wd and dg Wg + du Wu of an expert's rows.
  template <class Epilogue>
  void multiply_down(WorkerScratch& scratch, const ActiveExpert& expert, const Strip& strip, Epilogue epilogue) const {
    const RowTable table = down_.table(output_rows_);
    down_.multiply(scratch, expert.expert, strip, {table, nullptr, expert.first_pair, expert.pairs}, epilogue);
  }
  template <class Epilogue>
  void multiply_gate_up(WorkerScratch& scratch, const ActiveExpert& expert, const Strip& strip,
                        Epilogue epilogue) const {
    const RowTable table = gate_up_.table(inner_rows_);
    gate_up_.multiply(scratch, expert.expert, strip, {table, nullptr, expert.first_pair, expert.pairs}, epilogue);
  }

 private:
  const LayerShape& shape_;
  IntegerTransposedGemm down_;
  IntegerTransposedGemm gate_up_;
  Buffer& output_rows_;
  Buffer& inner_rows_;
};

}  // namespace kt
