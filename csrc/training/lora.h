// The LoRA of a layer's experts: as its caller has it, and as the kernels read it.
#pragma once

#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "moe/routing.h"
#include "moe/weights.h"

namespace kt {

// fp32, contiguous: gate_a, up_a [experts, rank, hidden], gate_b, up_b [experts, intermediate, rank],
// down_a [experts, rank, intermediate], down_b [experts, hidden, rank].
template <class Float>
struct LoraTensors {
  Float* gate_a;
  Float* gate_b;
  Float* up_a;
  Float* up_b;
  Float* down_a;
  Float* down_b;
};

// Dropout: which inputs of gate's, up's and down's A are kept, a byte each, [tokens * top_k, columns of A] in the order
// of the caller's ids. Null: all of them.
using KeptInputs = PerProjection<const uint8_t*>;

struct Lora {
  LoraTensors<const float> tensors;
  int rank;
  float scale;  // times 1 / (1 - p), where inputs are dropped
  KeptInputs kept{};
};

// The active experts' matrices as [rank][columns], columns padded to whole panels by zeros: A as it is, B transposed.
class PackedLora {
 public:
  struct Expert {
    const float* gate_a;  // [rank][hidden_padded], as are up_a and down_b
    const float* up_a;
    const float* down_b;
    const float* gate_b;  // [rank][intermediate_padded], as are up_b and down_a
    const float* up_b;
    const float* down_a;
  };

  // In `memory`, on all threads.
  PackedLora(const Lora& lora, const LayerShape& shape, const std::vector<ActiveExpert>& experts, ThreadPools& pools,
             Buffer& memory);

  int rank() const { return rank_; }
  float scale() const { return scale_; }
  bool drops() const { return kept_[Projection::kGate] != nullptr; }
  // Zeros among `columns` of a row of the input of A, or of its gradient, of the pair at `entry` of the caller's ids.
  void drop(Projection which, int64_t entry, int first, int columns, float* row) const;
  // By place among the active experts.
  Expert of(size_t index) const;

 private:
  size_t hidden_floats() const { return size_t{1} * rank_ * shape_.hidden_padded(); }
  size_t intermediate_floats() const { return size_t{1} * rank_ * shape_.intermediate_padded(); }
  size_t floats_per_expert() const { return 3 * (hidden_floats() + intermediate_floats()); }
  void pack(const LoraTensors<const float>& tensors, int expert, float* to) const;

  LayerShape shape_;
  int rank_;
  float scale_;
  KeptInputs kept_;
  const float* first_;
};

}  // namespace kt
