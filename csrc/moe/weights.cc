#include "moe/weights.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
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

// Panels begin at cache lines, whatever stands before them.
size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int LayerShape::hidden_padded() const { return padded_k(hidden); }
int LayerShape::intermediate_padded() const { return padded_k(intermediate); }
int LayerShape::hidden_panels() const { return panels_of(hidden); }
int LayerShape::intermediate_panels() const { return panels_of(intermediate); }

const char* name_of(Projection projection) {
  switch (projection) {
    case Projection::kGate:
      return "gate";
    case Projection::kUp:
      return "up";
    case Projection::kDown:
      return "down";
  }
  __builtin_unreachable();
}

PanelRange subpool_share(int panels, const ThreadPools& pools, int index) {
  int before = 0;
  for (int p = 0; p < index; ++p) before += pools.threads_in(p);
  const int64_t total = pools.threads();
  return {static_cast<int>(panels * int64_t{before} / total),
          static_cast<int>(panels * int64_t{before + pools.threads_in(index)} / total)};
}

ExpertWeights::ExpertWeights(const PerProjection<Served>& served, const FormatOptions& options, const LayerShape& shape,
                             ThreadPools& pools)
    : served_(served), options_(options), shape_(shape), pools_(pools) {
  for (const Projection p : kProjections) layouts_[p] = panel_layout(format(p), matrix(p), options);
  PanelLayout& down = layouts_[Projection::kDown];
  down.int8_step_k = std::min(down.int8_step_k, kDownInt8StepK);
  down.int8_sum_k = std::min(down.int8_sum_k, down.int8_step_k);
  paired_ = &format(Projection::kGate) == &format(Projection::kUp);
  for (int s = 0; s < pools.subpools(); ++s) shares_.push_back(share_of(s));
}

MatrixShape ExpertWeights::matrix(Projection projection) const {
  if (projection == Projection::kDown) return {shape_.hidden, shape_.intermediate};
  return {shape_.intermediate, shape_.hidden};
}

ExpertWeights::Share ExpertWeights::share_of(int subpool) const {
  Share share{};
  for (const Projection p : kProjections) {
    share.panels[p] = subpool_share(panels_of(p), pools_, subpool);
    share.distance[p] = layouts_[p].panel_bytes;
    share.bytes_per_expert += aligned(share.panels[p].count() * layouts_[p].panel_bytes);
  }
  return share;
}

size_t ExpertWeights::bytes_per_expert() const {
  size_t total = 0;
  for (const Share& share : shares_) total += share.bytes_per_expert;
  return total;
}

void ExpertWeights::allocate(Share& share, Buffer memory) const {
  share.memory = std::move(memory);
  const auto bytes = [&](Projection p) { return aligned(share.panels[p].count() * layouts_[p].panel_bytes); };
  const size_t panel_bytes = layouts_[Projection::kGate].panel_bytes;
  if (paired_) share.distance[Projection::kGate] = share.distance[Projection::kUp] = 2 * panel_bytes;
  for (int expert = 0; expert < shape_.num_experts; ++expert) {
    const uint8_t* gate = share.memory.data() + expert * share.bytes_per_expert;
    share.first[Projection::kGate].push_back(gate);
    share.first[Projection::kUp].push_back(gate + (paired_ ? panel_bytes : bytes(Projection::kGate)));
    share.first[Projection::kDown].push_back(gate + bytes(Projection::kGate) + bytes(Projection::kUp));
  }
}

void ExpertWeights::copy_biases(const ExpertSources& sources) {
  for (const Projection p : kProjections) {
    const auto has_bias = [](const MatrixSource& source) { return source.bias != nullptr; };
    if (std::none_of(sources[p].begin(), sources[p].end(), has_bias)) continue;
    const size_t rows = size_t{1} * panels_of(p) * kPanelRows;
    biases_[p].assign(sources[p].size() * rows, 0.0f);
    for (size_t e = 0; e < sources[p].size(); ++e) {
      if (has_bias(sources[p][e])) std::copy_n(sources[p][e].bias, matrix(p).rows, &biases_[p][e * rows]);
    }
  }
}

void ExpertWeights::load(const ExpertSources& sources) {
  copy_biases(sources);
  for (size_t s = 0; s < shares_.size(); ++s) {
    allocate(shares_[s], Buffer(bytes_of(shares_[s]), pools_.node_of(static_cast<int>(s))));
  }
  // One expert per piece: its three matrices are read front to back.
  pools_.for_each_in_subpools(std::vector<int>(pools_.subpools(), shape_.num_experts),
                              [&](const Worker&, int subpool, int expert) { load_expert(subpool, sources, expert); });
}

void ExpertWeights::load_expert(int subpool, const ExpertSources& sources, int expert) {
  const auto pack = [&](Projection p, int index) {
    try {
      pack_panel(format(p), layouts_[p], options_, sources[p][expert], matrix(p), panels(p, subpool).begin + index,
                 const_cast<uint8_t*>(panel(p, subpool, expert, index)));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("expert " + std::to_string(expert) + ", " + name_of(p) + ": " + error.what());
    }
  };
  for (int i = 0; i < panels(Projection::kGate, subpool).count(); ++i) {
    pack(Projection::kGate, i);
    pack(Projection::kUp, i);
  }
  for (int i = 0; i < panels(Projection::kDown, subpool).count(); ++i) pack(Projection::kDown, i);
}

void ExpertWeights::borrow(const ExpertSources& sources) {
  for (const Projection p : kProjections) {
    if (format(p).codes == CodeType::kBlocks && matrix(p).rows % kPanelRows == 0) continue;
    throw std::invalid_argument(std::string(name_of(p)) + " of format " + format(p).name + " and " +
                                std::to_string(matrix(p).rows) +
                                " rows cannot be used where it lies; expected blocks and a multiple of " +
                                std::to_string(kPanelRows) + " rows");
  }
  paired_ = false;
  copy_biases(sources);
  for (Share& share : shares_) {
    for (const Projection p : kProjections) {
      for (const MatrixSource& source : sources[p]) {
        share.first[p].push_back(source.codes + share.panels[p].begin * layouts_[p].panel_bytes);
      }
    }
  }
}

// A file holds the shares, each in whole huge pages, and behind them the biases of all matrices, if there are any.
size_t ExpertWeights::panel_file_bytes() const {
  size_t total = 0;
  for (const Share& share : shares_) total += Buffer::rounded(bytes_of(share));
  return total;
}

size_t ExpertWeights::bias_file_bytes() const {
  size_t floats = 0;
  for (const Projection p : kProjections) floats += bias_floats(p);
  return Buffer::rounded(floats * sizeof(float));
}

bool ExpertWeights::has_biases() const {
  return std::any_of(biases_.values.begin(), biases_.values.end(), [](const auto& all) { return !all.empty(); });
}

void ExpertWeights::map_shares(int file) {
  size_t offset = 0;
  for (Share& share : shares_) {
    allocate(share, Buffer::of_file(file, offset, bytes_of(share)));
    offset += Buffer::rounded(bytes_of(share));
  }
}

std::shared_ptr<ExpertWeights> ExpertWeights::in_file(int file) const {
  for (const Share& share : shares_) {
    if (bytes_of(share) <= share.memory.size()) continue;
    throw std::invalid_argument("experts that are used where they lie in their file are shared already");
  }
  const size_t bytes = panel_file_bytes() + (has_biases() ? bias_file_bytes() : 0);
  if (ftruncate(file, static_cast<off_t>(bytes)) != 0) {
    throw std::runtime_error("shared memory of " + std::to_string(bytes) +
                             " bytes cannot be had: " + std::strerror(errno));
  }
  auto made = std::make_shared<ExpertWeights>(served_, options_, shape_, pools_);
  made->map_shares(file);
  pools_.for_each_in_subpools(
      std::vector<int>(pools_.subpools(), shape_.num_experts), [&](const Worker&, int subpool, int expert) {
        const Share& share = shares_[subpool];
        const size_t begin = expert * share.bytes_per_expert;
        std::copy_n(share.memory.data() + begin, share.bytes_per_expert, made->shares_[subpool].memory.data() + begin);
      });
  if (!has_biases()) return made;
  const Buffer all = Buffer::of_file(file, panel_file_bytes(), bias_file_bytes());
  float* to = all.as<float>();
  for (const Projection p : kProjections) {
    std::copy(biases_[p].begin(), biases_[p].end(), to);
    to += bias_floats(p);
  }
  made->biases_ = biases_;
  return made;
}

void ExpertWeights::attach(int file) {
  struct stat found{};
  const size_t bytes = fstat(file, &found) == 0 ? static_cast<size_t>(found.st_size) : 0;
  const bool biased = bytes == panel_file_bytes() + bias_file_bytes();
  if (bytes != panel_file_bytes() && !biased) {
    throw std::invalid_argument("the shared experts have " + std::to_string(bytes) + " bytes, expected " +
                                std::to_string(panel_file_bytes()) +
                                " and those of biases; give all processes of a host the same options");
  }
  map_shares(file);
  if (!biased) return;
  const Buffer all = Buffer::of_file(file, panel_file_bytes(), bias_file_bytes());
  const float* from = all.as<float>();
  for (const Projection p : kProjections) {
    biases_[p].assign(from, from + bias_floats(p));
    from += bias_floats(p);
  }
}

void ExpertWeights::check_ranks(int ranks) const {
  for (const Projection p : {Projection::kGate, Projection::kUp}) {
    check_split(format(p), layouts_[p], matrix(p), ranks, 1);
  }
  check_split(format(Projection::kDown), layouts_[Projection::kDown], matrix(Projection::kDown), 1, ranks);
}

void ExpertWeights::write(int expert, const RankTargets& targets) const {
  std::vector<int> pieces;
  for (int s = 0; s < pools_.subpools(); ++s) pieces.push_back(pieces_of(s));
  pools_.for_each_in_subpools(
      pieces, [&](const Worker&, int subpool, int piece) { write_piece(subpool, expert, piece, targets); });
}

void ExpertWeights::write_alone(int expert, const RankTargets& targets) const {
  for (int s = 0; s < pools_.subpools(); ++s) {
    for (int piece = 0; piece < pieces_of(s); ++piece) write_piece(s, expert, piece, targets);
  }
}

int ExpertWeights::pieces_of(int subpool) const {
  return panels(Projection::kGate, subpool).count() + panels(Projection::kDown, subpool).count();
}

// A piece is a pair of gate and up panels, or a down panel.
void ExpertWeights::write_piece(int subpool, int expert, int piece, const RankTargets& targets) const {
  const int pairs = panels(Projection::kGate, subpool).count();
  if (piece >= pairs) return write_down(subpool, expert, piece - pairs, targets);
  write_half(subpool, expert, piece, Projection::kGate, targets);
  write_half(subpool, expert, piece, Projection::kUp, targets);
}

// In a transposed matrix the up columns follow the gate columns of each row, else the up rows follow the gate rows.
void ExpertWeights::write_half(int subpool, int expert, int index, Projection which, const RankTargets& targets) const {
  const Format& written = format(which);
  const PanelLayout& layout = layouts_[which];
  const bool transposed = written.order == Order::kTransposed;
  const int ranks = static_cast<int>(targets.gate_up.size());
  const int rows = shape_.intermediate / ranks;
  for (int r = 0; r < ranks; ++r) {
    const MatrixPart part = {r * rows, rows, 0, shape_.hidden};
    MatrixTarget target = targets.gate_up[r];
    target.row_length = 2 * rows;
    if (which == Projection::kUp) {
      target.codes += transposed ? size_t{4} * rows : written_code_bytes(written, part);
      target.scales += written_scale_bytes(written, layout, transposed ? MatrixPart{0, rows, 0, 1} : part);
    }
    unpack_panel(written, layout, panel(which, subpool, expert, index), panels(which, subpool).begin + index, part,
                 target);
  }
}

void ExpertWeights::write_down(int subpool, int expert, int index, const RankTargets& targets) const {
  const Projection which = Projection::kDown;
  const int ranks = static_cast<int>(targets.down.size());
  const int columns = shape_.intermediate / ranks;
  for (int r = 0; r < ranks; ++r) {
    MatrixTarget target = targets.down[r];
    target.row_length = shape_.hidden;
    unpack_panel(format(which), layouts_[which], panel(which, subpool, expert, index),
                 panels(which, subpool).begin + index, {0, shape_.hidden, r * columns, columns}, target);
  }
}

}  // namespace kt
