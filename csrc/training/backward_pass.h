// The gradients of one forward call of training (training/forward.h), from the output's gradient `dout`.
//
// With weights w of a pair, s the LoRA's scale, and rows of pairs sorted by expert:
//
//   q_down = s dout Bd                 thin, [pairs, rank]
//   dh     = dout Wd + q_down Ad       of h without the routing weight, so dw = <dh, h> (+ <dout, bias of down>)
//   dg, du = SwiGLU backward of w dh, from the saved g and u; h is computed again
//   q_gate = s dg Bg, q_up = s du Bu
//   dWg = dg^T x, dWu likewise, dWd = (w dout)^T h
//   dAg = q_gate^T x,  dBg = dg^T p_gate  and the same of up;  dAd = (w q_down)^T h,  dBd = (w dout)^T p_down
//   dx[t]  = sum over pairs of (dg Wg + du Wu + q_gate Ag + q_up Au)
//
// Products with base weights by TransposedGemm or, where the layer multiplies int8 activations and its weights allow,
// by IntegerBackward, the thin ones in fp32. Phases, each of which needs all of the ones
// before: outputs' gradients as kernels multiply them; q_down; dh to dg, du, h; q_gate and q_up; gradients of matrices;
// dx. Sums over the rows of an expert run in ascending pairs, sums over the experts of a token in ascending experts,
// and dw adds panels of 32 columns in ascending order: no result depends on threads.
#pragma once

#include <optional>
#include <vector>

#include "training/base_gradients.h"
#include "training/forward.h"
#include "training/integer_backward.h"
#include "training/row_blocks.h"
#include "training/transposed_gemm.h"

namespace kt {

struct BackwardArgs {
  RoutingInput routing;
  const void* hidden;  // [tokens, hidden], as are the gradients of output and hidden states
  SavedRows saved;     // of the forward call; `projected` only with a LoRA
  const void* output_gradient;
  DType type;                                // of the gradients of output and hidden states, and of the latter
  void* hidden_gradient;                     // null: not wanted, as are those below
  float* weight_gradient;                    // [tokens, top_k], zeros: skipped entries are left
  const Lora* lora;                          // null: none
  const LoraTensors<float>* lora_gradients;  // zeros: experts without rows are left
  const BaseGradients* base_gradients;
};

// Throws as MoeLayer::forward.
void training_backward(MoeLayer& layer, const BackwardArgs& args);

class BackwardPass {
 public:
  BackwardPass(Engine& engine, const LayerConfig& config, const ExpertWeights& weights, const Routing& routing,
               const BackwardArgs& args);

  // On the caller and the engine's workers, until all is computed.
  void run();

 private:
  using Strip = TransposedGemm::Strip;
  // Sums of pairs [first, +count), `stride` floats apart.
  struct ThinRows {
    int first;
    int count;
    float* sums;
    size_t stride;
  };

  void reserve();
  bool reads_output() const { return integers_ || lora_ || (args_.weight_gradient != nullptr && has_down_bias()); }
  bool has_down_bias() const { return weights_.bias(Projection::kDown, 0, 0) != nullptr; }
  Strip strip_of(const TransposedGemm& gemm, int index, int panels) const;

  void prepare_output_gradient(int token);
  void output_rows(const Worker& worker, int piece);
  void inner(const Worker& worker, int piece);
  void inner_row(int pair, const Strip& strip, const float* dh, const IntegerBackward::InnerScales* scales);
  void gate_up_rows(const Worker& worker, int piece);
  void hidden_strip(const Worker& worker, int piece);
  // The product of an expert for a strip of dx, to be added to `totals`.
  void hidden_product(WorkerScratch& scratch, size_t index, const Strip& strip, float* totals) const;
  void hidden_integer_product(WorkerScratch& scratch, size_t index, const Strip& strip, float* totals) const;
  void add_hidden(WorkerScratch& scratch, size_t index, const Strip& strip, const ThinRows& rows, float* totals) const;
  void store_hidden(const float* sums, const Strip& strip) const;
  void weight_gradients() const;
  void add_thin(WorkerScratch& scratch, Projection which, const float* a, size_t a_stride, const Strip& strip,
                const ThinRows& rows) const;
  void add_thin_kept(WorkerScratch& scratch, const AddOuterArgs& product, Projection which, int first_pair,
                     const Strip& strip) const;
  // Of gate, up or down: [pairs, rank].
  float* thin(Projection which) const;
  float* sums_of_row(int pair) const { return sums_ + size_t{1} * pair * config_.shape.intermediate_panels(); }

  Engine& engine_;
  const LayerConfig& config_;
  const ExpertWeights& weights_;
  const Routing& routing_;
  const BackwardArgs& args_;
  const TrainingKernels& kernels_;
  TransposedGemm gate_;
  TransposedGemm up_;
  TransposedGemm down_;
  const RowKernels& rows_;
  TensorRows hidden_;
  TensorRows output_gradient_;
  TensorRows saved_gate_;
  TensorRows saved_up_;
  std::optional<PackedLora> lora_;
  std::optional<IntegerBackward> integers_;
  ExpertPieces blocks_;
  int inner_strip_panels_;
  int hidden_strip_panels_;
  RowTable output_rows_;  // dout by token
  ElementRows dgate_;     // by pair
  ElementRows dup_;
  ElementRows h_;
  float* thin_;
  float* sums_;       // [pairs][panels of the intermediate dimension]: what dw is the sum of
  float* bias_sums_;  // [pairs]: <dout, bias of down>
  std::vector<float> ones_;
};

}  // namespace kt
