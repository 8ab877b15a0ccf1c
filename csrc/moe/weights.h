// The packed experts of one layer, each NUMA sub-pool holding its share.
//
// gate and up: sub-pool s owns a range of panels of the intermediate dimension. Per expert they stand in memory as gate
// 0, up 0, gate 1, up 1, ... so that one stream feeds one SwiGLU, where both have the same format, and as all of gate
// and then all of up where they differ.
// down: sub-pool s owns a range of panels of the hidden dimension (rows of down), each with all of K.
//
// A matrix may have biases, one number a row: fp32, of all experts side by side, as long as whole panels.
//
// Splitting down by rows instead of columns needs the whole SwiGLU output on every node (a few KiB per token), and in
// return there are no partial outputs to add up: the result has the same bits for any number of sub-pools.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "formats/panel.h"
#include "kernels/dispatch.h"

namespace kt {

struct LayerShape {
  int num_experts;
  int hidden;
  int intermediate;

  int hidden_padded() const;        // K of gate and up
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

// The three matrices of an expert: gate, up [intermediate, hidden], down [hidden, intermediate].
enum class Projection : int { kGate, kUp, kDown };
constexpr std::array<Projection, 3> kProjections = {Projection::kGate, Projection::kUp, Projection::kDown};
const char* name_of(Projection projection);

template <class T>
struct PerProjection {
  std::array<T, 3> values;
  T& operator[](Projection p) { return values[static_cast<int>(p)]; }
  const T& operator[](Projection p) const { return values[static_cast<int>(p)]; }
};

// One layer's experts in checkpoint layout, by slot.
using ExpertSources = PerProjection<std::vector<MatrixSource>>;

// Where one expert is written back, per device rank: gate rows then up rows, and a slice of down's columns.
struct RankTargets {
  std::vector<MatrixTarget> gate_up;
  std::vector<MatrixTarget> down;
};

class ExpertWeights {
 public:
  // Throws std::invalid_argument when a format cannot hold a matrix of this shape.
  ExpertWeights(const PerProjection<Served>& served, const FormatOptions& options, const LayerShape& shape,
                ThreadPools& pools);

  // Packs on all threads, each sub-pool its own share (first touch).
  void load(const ExpertSources& sources);
  // Uses panels that lie in the sources as they are (CodeType::kBlocks), whose memory must outlive this. Throws
  // std::invalid_argument for formats and shapes whose sources are not panels.
  void borrow(const ExpertSources& sources);
  // The same experts in an open file, which is given the length they need, for the processes of a host; of weights that
  // were loaded. Throws std::invalid_argument for borrowed ones.
  std::shared_ptr<ExpertWeights> in_file(int file) const;
  // Uses what `in_file` of a process with the same pools wrote. Throws std::invalid_argument for a file of another
  // length.
  void attach(int file);

  // Throws std::invalid_argument unless an expert can be split over `ranks`.
  void check_ranks(int ranks) const;
  // Writes one expert back, on all threads, or on the calling one alone, beside whatever the others compute.
  void write(int expert, const RankTargets& targets) const;
  void write_alone(int expert, const RankTargets& targets) const;

  // Panel `index` of a sub-pool's share.
  const uint8_t* panel(Projection projection, int subpool, int expert, int index) const {
    const Share& share = shares_[subpool];
    return share.first[projection][expert] + index * share.distance[projection];
  }
  // Of the rows of panel `index` of the whole matrix and those below it, up to the end of the matrix's last panel; null
  // where no expert has biases.
  const float* bias(Projection projection, int expert, int index) const {
    const std::vector<float>& all = biases_[projection];
    return all.empty() ? nullptr : &all[(size_t{1} * expert * panels_of(projection) + index) * kPanelRows];
  }
  // gate and up panels stand side by side: pair i is panel(kGate, …, i) and the one behind it.
  bool paired() const { return paired_; }

  const Format& format(Projection projection) const { return *served_[projection].format; }
  const KernelSet& kernels(Projection projection) const { return *served_[projection].kernels; }
  PerProjection<const KernelSet*> kernel_sets() const {
    return {{served_.values[0].kernels, served_.values[1].kernels, served_.values[2].kernels}};
  }
  const PanelLayout& layout(Projection projection) const { return layouts_[projection]; }
  // gate and up have the same range.
  PanelRange panels(Projection projection, int subpool) const { return shares_[subpool].panels[projection]; }
  int subpools() const { return static_cast<int>(shares_.size()); }
  const LayerShape& shape() const { return shape_; }
  size_t bytes() const { return bytes_per_expert() * shape_.num_experts; }
  size_t bytes_per_expert() const;

 private:
  struct Share {
    PerProjection<PanelRange> panels;
    PerProjection<size_t> distance;                    // bytes from a panel to the next
    PerProjection<std::vector<const uint8_t*>> first;  // panel of an expert
    size_t bytes_per_expert;
    Buffer memory;
  };
  MatrixShape matrix(Projection projection) const;
  int panels_of(Projection projection) const {
    return projection == Projection::kDown ? shape_.hidden_panels() : shape_.intermediate_panels();
  }
  void copy_biases(const ExpertSources& sources);
  Share share_of(int subpool) const;
  void allocate(Share& share, Buffer memory) const;
  size_t bytes_of(const Share& share) const { return share.bytes_per_expert * shape_.num_experts; }
  size_t bias_floats(Projection p) const { return size_t{1} * shape_.num_experts * panels_of(p) * kPanelRows; }
  size_t panel_file_bytes() const;
  size_t bias_file_bytes() const;
  bool has_biases() const;
  void map_shares(int file);
  void load_expert(int subpool, const ExpertSources& sources, int expert);
  int pieces_of(int subpool) const;
  void write_piece(int subpool, int expert, int piece, const RankTargets& targets) const;
  void write_half(int subpool, int expert, int index, Projection which, const RankTargets& targets) const;
  void write_down(int subpool, int expert, int index, const RankTargets& targets) const;

  PerProjection<Served> served_;
  FormatOptions options_;
  LayerShape shape_;
  ThreadPools& pools_;
  PerProjection<PanelLayout> layouts_;
  bool paired_;
  PerProjection<std::vector<float>> biases_;  // [expert][rows of all panels], or empty
  std::vector<Share> shares_;
};

}  // namespace kt
