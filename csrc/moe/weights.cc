#include "moe/weights.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

// SwiGLU's outputs have longer tails than hidden states, so they get a scale for fewer columns. NMSE of a layer with
// normal weights and activations (shape S, RAWINT4 per row, 2026-11-30), columns of gate and up / of down: 32 / 32
// 1.4e-4, 64 / 32 1.5e-4, 64 / 64 1.9e-4, 128 / 128 2.5e-4; 2e-4 is the limit.
constexpr int kDownInt8StepK = 32;

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

ExpertWeights::ExpertWeights(const Format& format, const FormatOptions& options, const LayerShape& shape,
                             ThreadPools& pools)
    : format_(format),
      options_(options),
      shape_(shape),
      pools_(pools),
      gate_up_layout_(panel_layout(format, gate_up_shape(), options)),
      down_layout_(panel_layout(format, down_shape(), options)) {
  down_layout_.int8_step_k = std::min(down_layout_.int8_step_k, kDownInt8StepK);
  for (int s = 0; s < pools.subpools(); ++s) {
    const PanelRange gate_up = subpool_share(shape.intermediate_panels(), pools, s);
    const PanelRange down = subpool_share(shape.hidden_panels(), pools, s);
    const size_t per_expert =
        2 * gate_up.count() * gate_up_layout_.panel_bytes + down.count() * down_layout_.panel_bytes;
    shares_.push_back({gate_up, down, per_expert, Buffer(per_expert * shape.num_experts, pools.node_of(s))});
  }
}

size_t ExpertWeights::bytes_per_expert() const {
  size_t total = 0;
  for (const Share& share : shares_) total += share.bytes_per_expert;
  return total;
}

void ExpertWeights::load(const ExpertSources& sources) {
  std::vector<std::atomic<int>> next(pools_.subpools());
  auto job = [&](const Worker& worker) {
    const Share& share = shares_[worker.subpool];
    while (true) {
      // One expert per piece: its three matrices are read front to back.
      const int expert = next[worker.subpool].fetch_add(1);
      if (expert >= shape_.num_experts || share.bytes_per_expert == 0) return;
      load_expert(share, sources, expert);
    }
  };
  pools_.run(job);
}

void ExpertWeights::load_expert(const Share& share, const ExpertSources& sources, int expert) {
  uint8_t* out = share.memory.data() + expert * share.bytes_per_expert;
  const auto pack = [&](const char* name, const MatrixSource& source, MatrixShape shape, const PanelLayout& layout,
                        int panel) {
    try {
      pack_panel(format_, layout, options_, source, shape, panel, out);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("expert " + std::to_string(expert) + ", " + name + ": " + error.what());
    }
    out += layout.panel_bytes;
  };
  for (int p = share.gate_up.begin; p < share.gate_up.end; ++p) {
    pack("gate", sources.gate[expert], gate_up_shape(), gate_up_layout_, p);
    pack("up", sources.up[expert], gate_up_shape(), gate_up_layout_, p);
  }
  for (int p = share.down.begin; p < share.down.end; ++p) {
    pack("down", sources.down[expert], down_shape(), down_layout_, p);
  }
}

void ExpertWeights::check_ranks(int ranks) const {
  check_split(format_, gate_up_layout_, gate_up_shape(), ranks, 1);
  check_split(format_, down_layout_, down_shape(), 1, ranks);
}

void ExpertWeights::write(int expert, const RankTargets& targets) const {
  std::vector<std::atomic<int>> next(pools_.subpools());
  auto job = [&](const Worker& worker) {
    while (true) {
      const int piece = next[worker.subpool].fetch_add(1);
      if (piece >= pieces_of(worker.subpool)) return;
      write_piece(worker.subpool, expert, piece, targets);
    }
  };
  pools_.run(job);
}

void ExpertWeights::write_alone(int expert, const RankTargets& targets) const {
  for (int s = 0; s < pools_.subpools(); ++s) {
    for (int piece = 0; piece < pieces_of(s); ++piece) write_piece(s, expert, piece, targets);
  }
}

int ExpertWeights::pieces_of(int subpool) const {
  return shares_[subpool].gate_up.count() + shares_[subpool].down.count();
}

// A piece is a pair of gate and up panels, or a down panel.
void ExpertWeights::write_piece(int subpool, int expert, int piece, const RankTargets& targets) const {
  const int ranks = static_cast<int>(targets.gate_up.size());
  const int rows = shape_.intermediate / ranks;
  const bool transposed = format_.order == Order::kTransposed;
  // In a transposed matrix the up columns follow the gate columns of each row, else the up rows follow the gate rows.
  const auto half = [&](const MatrixTarget& target, const MatrixPart& part, int which) {
    const size_t codes = transposed ? size_t{4} * part.rows : written_code_bytes(format_, part);
    const size_t scales =
        written_scale_bytes(format_, gate_up_layout_, transposed ? MatrixPart{0, part.rows, 0, 1} : part);
    return MatrixTarget{target.codes + which * codes, target.scales + which * scales, 2 * part.rows};
  };

  const Share& share = shares_[subpool];
  const int pairs = share.gate_up.count();
  for (int r = 0; r < ranks; ++r) {
    if (piece < pairs) {
      const MatrixPart part = {r * rows, rows, 0, shape_.hidden};
      for (int which = 0; which < 2; ++which) {
        const uint8_t* panel = gate_up(subpool, expert) + (2 * piece + which) * gate_up_layout_.panel_bytes;
        unpack_panel(format_, gate_up_layout_, panel, share.gate_up.begin + piece, part,
                     half(targets.gate_up[r], part, which));
      }
    } else {
      const MatrixPart part = {0, shape_.hidden, r * rows, rows};
      MatrixTarget target = targets.down[r];
      target.row_length = shape_.hidden;
      const uint8_t* panel = down(subpool, expert) + (piece - pairs) * down_layout_.panel_bytes;
      unpack_panel(format_, down_layout_, panel, share.down.begin + piece - pairs, part, target);
    }
  }
}

}  // namespace kt
