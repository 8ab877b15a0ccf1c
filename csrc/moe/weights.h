// The packed experts of one layer, each NUMA sub-pool holding its share.
//
// gate/up: sub-pool s owns a range of panels of the intermediate dimension (rows of gate and up). Per expert its panels
// stand in memory as gate 0, up 0, gate 1, up 1, ... so that one stream feeds one SwiGLU.
// down: sub-pool s owns a range of panels of the hidden dimension (rows of down), each with all of K.
//
// Splitting down by rows instead of columns needs the whole SwiGLU output on every node (a few KiB per token), and in
// return there are no partial outputs to add up: the result has the same bits for any number of sub-pools.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"

namespace kt {

struct LayerShape {
  int num_experts;
  int hidden;
  int intermediate;

  int hidden_padded() const;        // K of gate/up
  int intermediate_padded() const;  // K of down
  int hidden_panels() const;
  int intermediate_panels() const;
};

struct PanelRange {
  int begin;
  int end;
  int count() const { return end - begin; }
};

// Sub-pool `index`'s share of `panels`, in proportion to its threads.
PanelRange subpool_share(int panels, const ThreadPools& pools, int index);

class Bf16Weights {
 public:
  Bf16Weights(const LayerShape& shape, ThreadPools& pools);

  // One row-major bf16 matrix per expert: gate, up [intermediate, hidden], down [hidden, intermediate]. Packs on all
  // threads, each sub-pool its own share (first touch).
  void load(const std::vector<const uint16_t*>& gate, const std::vector<const uint16_t*>& up,
            const std::vector<const uint16_t*>& down);

  // First panel of (sub-pool, expert); the panels follow each other at gate_up_stride()/down_stride().
  const uint8_t* gate_up(int subpool, int expert) const {
    return shares_[subpool].memory.data() + expert * shares_[subpool].bytes_per_expert;
  }
  const uint8_t* down(int subpool, int expert) const {
    return gate_up(subpool, expert) + 2 * shares_[subpool].gate_up.count() * gate_up_stride();
  }
  size_t gate_up_stride() const;
  size_t down_stride() const;
  PanelRange gate_up_panels(int subpool) const { return shares_[subpool].gate_up; }
  PanelRange down_panels(int subpool) const { return shares_[subpool].down; }
  size_t bytes() const;
  // Bytes that one k of a panel takes, the step for splitting K over calls.
  static constexpr size_t kBytesPerK = 64;

 private:
  struct Share {
    PanelRange gate_up;
    PanelRange down;
    size_t bytes_per_expert;
    Buffer memory;
  };
  LayerShape shape_;
  ThreadPools& pools_;
  std::vector<Share> shares_;
};

}  // namespace kt
