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
#include "formats/panel.h"

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

// One layer's experts in checkpoint layout, by slot: gate, up [intermediate, hidden], down [hidden, intermediate].
struct ExpertSources {
  std::vector<MatrixSource> gate;
  std::vector<MatrixSource> up;
  std::vector<MatrixSource> down;
};

// Where one expert is written back, per device rank: gate rows then up rows, and a slice of down's columns.
struct RankTargets {
  std::vector<MatrixTarget> gate_up;
  std::vector<MatrixTarget> down;
};

class ExpertWeights {
 public:
  // Throws std::invalid_argument when the format cannot hold matrices of this shape.
  ExpertWeights(const Format& format, const FormatOptions& options, const LayerShape& shape, ThreadPools& pools);

  // Packs on all threads, each sub-pool its own share (first touch).
  void load(const ExpertSources& sources);

  // Throws std::invalid_argument unless an expert can be split over `ranks`.
  void check_ranks(int ranks) const;
  // Writes one expert back, on all threads, or on the calling one alone, beside whatever the others compute.
  void write(int expert, const RankTargets& targets) const;
  void write_alone(int expert, const RankTargets& targets) const;

  // First panel of (sub-pool, expert); panels follow each other at their layout's panel_bytes.
  const uint8_t* gate_up(int subpool, int expert) const {
    return shares_[subpool].memory.data() + expert * shares_[subpool].bytes_per_expert;
  }
  const uint8_t* down(int subpool, int expert) const {
    return gate_up(subpool, expert) + 2 * shares_[subpool].gate_up.count() * gate_up_layout_.panel_bytes;
  }
  const Format& format() const { return format_; }
  const PanelLayout& gate_up_layout() const { return gate_up_layout_; }
  const PanelLayout& down_layout() const { return down_layout_; }
  PanelRange gate_up_panels(int subpool) const { return shares_[subpool].gate_up; }
  PanelRange down_panels(int subpool) const { return shares_[subpool].down; }
  size_t bytes() const { return bytes_per_expert() * shape_.num_experts; }
  size_t bytes_per_expert() const;

 private:
  struct Share {
    PanelRange gate_up;
    PanelRange down;
    size_t bytes_per_expert;
    Buffer memory;
  };
  MatrixShape gate_up_shape() const { return {shape_.intermediate, shape_.hidden}; }
  MatrixShape down_shape() const { return {shape_.hidden, shape_.intermediate}; }
  void load_expert(const Share& share, const ExpertSources& sources, int expert);
  int pieces_of(int subpool) const;
  void write_piece(int subpool, int expert, int piece, const RankTargets& targets) const;

  const Format& format_;
  FormatOptions options_;
  LayerShape shape_;
  ThreadPools& pools_;
  PanelLayout gate_up_layout_;
  PanelLayout down_layout_;
  std::vector<Share> shares_;
};

}  // namespace kt
