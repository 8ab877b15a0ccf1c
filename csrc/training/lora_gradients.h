// Gradients of a LoRA's matrices: for each active expert, sums over its pairs of one thin row times one wide row.
//
//   dAg = q_gate^T x    dAu = q_up^T x    dBd = (p_down^T (w dout))^T     strips of hidden columns
//   dBg = (p_gate^T dg)^T                 dAd = (w q_down)^T h            strips of intermediate columns, dBu likewise
#pragma once

#include "training/gradient_inputs.h"
#include "training/lora.h"

namespace kt {

class LoraGradientPieces {
 public:
  LoraGradientPieces(Engine& engine, const LayerShape& shape, const Routing& routing, const PackedLora& lora,
                     const LoraTensors<float>& gradients);

  // An expert's strip of columns each.
  int count() const { return static_cast<int>(routing_.experts().size()) * (hidden_strips_ + intermediate_strips_); }
  void compute(const GradientInputs& inputs, const Worker& worker, int piece) const;

 private:
  // The sums of one matrix, [rank][kStripColumns], and where they go.
  struct Sums {
    float* sums;
    float* to;
  };
  void hidden_strip(const GradientInputs& inputs, WorkerScratch& scratch, const ActiveExpert& expert,
                    const Columns& columns) const;
  void intermediate_strip(const GradientInputs& inputs, WorkerScratch& scratch, const ActiveExpert& expert,
                          const Columns& columns) const;
  void add(const float* thin, int rows, const float* wide, const Columns& columns, float* sums) const;
  void drop(Projection which, int pair, int rows, const Columns& columns, float* wide) const;
  const float* weighted(const float* thin, int pair, int rows, float* room) const;
  void store_a(const float* sums, const Columns& columns, float* gradient, int expert) const;
  void store_b(const float* sums, const Columns& columns, float* gradient, int expert) const;
  size_t sums_floats() const;

  Engine& engine_;
  const LayerShape& shape_;
  const Routing& routing_;
  const PackedLora& lora_;
  size_t rank_;
  const LoraTensors<float>& gradients_;
  const TrainingKernels& kernels_;
  int hidden_strips_;
  int intermediate_strips_;
};

}  // namespace kt
