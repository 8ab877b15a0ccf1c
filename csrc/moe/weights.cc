#include "moe/weights.h"

#include <atomic>

#include "formats/bf16.h"
#include "kernels/kernel_set.h"

namespace kt {
namespace {

int panels_of(int rows) { return (rows + kPanelRows - 1) / kPanelRows; }
int padded_k(int k) { return (k + kPanelK - 1) / kPanelK * kPanelK; }

}  // namespace

int LayerShape::hidden_padded() const { return padded_k(hidden); }
int LayerShape::intermediate_padded() const { return padded_k(intermediate); }
int LayerShape::hidden_panels() const { return panels_of(hidden); }
int LayerShape::intermediate_panels() const { return panels_of(intermediate); }

PanelRange subpool_share(int panels, const ThreadPools& pools, int index) {
  int before = 0;
  for (int p = 0; p < index; ++p) before += pools.threads_in(p);
  const int64_t total = pools.threads();
  return {static_cast<int>(panels * int64_t{before} / total),
          static_cast<int>(panels * int64_t{before + pools.threads_in(index)} / total)};
}

Bf16Weights::Bf16Weights(const LayerShape& shape, ThreadPools& pools) : shape_(shape), pools_(pools) {
  for (int s = 0; s < pools.subpools(); ++s) {
    const PanelRange gate_up = subpool_share(shape.intermediate_panels(), pools, s);
    const PanelRange down = subpool_share(shape.hidden_panels(), pools, s);
    const size_t per_expert = 2 * gate_up.count() * gate_up_stride() + down.count() * down_stride();
    shares_.push_back({gate_up, down, per_expert, Buffer(per_expert * shape.num_experts, pools.node_of(s))});
  }
}

size_t Bf16Weights::gate_up_stride() const { return bf16::panel_bytes(shape_.hidden_padded()); }
size_t Bf16Weights::down_stride() const { return bf16::panel_bytes(shape_.intermediate_padded()); }

size_t Bf16Weights::bytes() const {
  size_t total = 0;
  for (const Share& share : shares_) total += share.bytes_per_expert * shape_.num_experts;
  return total;
}

void Bf16Weights::load(const std::vector<const uint16_t*>& gate, const std::vector<const uint16_t*>& up,
                       const std::vector<const uint16_t*>& down) {
  std::vector<std::atomic<int>> next(pools_.subpools());
  auto job = [&](const Worker& worker) {
    const Share& share = shares_[worker.subpool];
    const int per_expert = 2 * share.gate_up.count() + share.down.count();
    while (true) {
      // One expert per piece: its three matrices are read front to back.
      const int expert = next[worker.subpool].fetch_add(1);
      if (expert >= shape_.num_experts || per_expert == 0) return;
      uint8_t* out = share.memory.data() + expert * share.bytes_per_expert;
      for (int p = share.gate_up.begin; p < share.gate_up.end; ++p) {
        for (const uint16_t* matrix : {gate[expert], up[expert]}) {
          bf16::pack_panel(matrix, shape_.intermediate, shape_.hidden, p * kPanelRows, shape_.hidden_padded(), out);
          out += gate_up_stride();
        }
      }
      for (int p = share.down.begin; p < share.down.end; ++p) {
        bf16::pack_panel(down[expert], shape_.hidden, shape_.intermediate, p * kPanelRows, shape_.intermediate_padded(),
                         out);
        out += down_stride();
      }
    }
  };
  pools_.run(job);
}

}  // namespace kt
