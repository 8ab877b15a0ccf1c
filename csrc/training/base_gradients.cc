#include "training/base_gradients.h"

namespace kt {
namespace {

// So many rows of a matrix of 2048 columns are 512 KiB of sums.
constexpr int kStripRows = 64;

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int padded(int columns) { return ceil_div(columns, kPanelRows) * kPanelRows; }

}  // namespace

BaseGradientPieces::BaseGradientPieces(Engine& engine, const LayerShape& shape, const Routing& routing,
                                       const BaseGradients& gradients)
    : engine_(engine), shape_(shape), routing_(routing), gradients_(gradients), kernels_(training_row_kernels()) {
  const ThreadPools& pools = engine.pools();
  const size_t columns = std::max(shape.hidden_padded(), shape.intermediate_padded());
  for (int worker = 0; worker < pools.threads(); ++worker) {
    const int node = pools.node_of(pools.subpool_of(worker));
    engine.scratch(worker).row.reserve(kRowsPerBlock * (columns + kStripRows) * sizeof(float), node);
    engine.scratch(worker).sum.reserve(kStripRows * columns * sizeof(float), node);
  }
}

MatrixShape BaseGradientPieces::matrix(Projection which) const {
  if (which == Projection::kDown) return {shape_.hidden, shape_.intermediate};
  return {shape_.intermediate, shape_.hidden};
}

int BaseGradientPieces::strips_of_expert() const {
  return 2 * ceil_div(shape_.intermediate, kStripRows) + ceil_div(shape_.hidden, kStripRows);
}

BaseGradientPieces::Strip BaseGradientPieces::strip_of(int index) const {
  for (const Projection which : kProjections) {
    const int rows = matrix(which).rows;
    const int strips = ceil_div(rows, kStripRows);
    if (index < strips) return {which, index * kStripRows, std::min(kStripRows, rows - index * kStripRows)};
    index -= strips;
  }
  __builtin_unreachable();
}

void BaseGradientPieces::compute(const GradientInputs& inputs, const Worker& worker, int piece) const {
  const ActiveExpert& expert = routing_.experts()[piece / strips_of_expert()];
  const Strip strip = strip_of(piece % strips_of_expert());
  const MatrixShape shape = matrix(strip.which);
  const size_t columns = padded(shape.k);
  WorkerScratch& scratch = engine_.scratch(worker.index);
  float* const left = scratch.row.as<float>();
  float* const right = left + kRowsPerBlock * kStripRows;
  float* const sums = scratch.sum.as<float>();
  std::fill_n(sums, strip.rows * columns, 0.0f);
  const int end = expert.first_pair + expert.pairs;
  for (int pair = expert.first_pair; pair < end; pair += kRowsPerBlock) {
    const int count = std::min(kRowsPerBlock, end - pair);
    load_left(inputs, strip, pair, count, left);
    load_right(inputs, strip, pair, count, right);
    kernels_.add_outer(
        {left, 1, kStripRows, strip.rows, count, right, columns, static_cast<int>(columns), sums, columns});
  }
  float* to = gradients_[strip.which] + (size_t{1} * expert.expert * shape.rows + strip.first) * shape.k;
  for (int r = 0; r < strip.rows; ++r, to += shape.k) std::copy_n(sums + r * columns, shape.k, to);
}

void BaseGradientPieces::load_left(const GradientInputs& inputs, const Strip& strip, int pair, int count,
                                   float* to) const {
  for (int i = 0; i < count; ++i, to += kStripRows) {
    if (strip.which != Projection::kDown) {
      const ElementRows& rows = strip.which == Projection::kGate ? inputs.dgate : inputs.dup;
      rows.load(pair + i, strip.first, strip.rows, to);
      continue;
    }
    inputs.output_gradient.load(routing_.token_of_pair()[pair + i], {strip.first, strip.rows, shape_.hidden}, to);
    for (int r = 0; r < strip.rows; ++r) to[r] *= routing_.weight_of_pair()[pair + i];
  }
}

void BaseGradientPieces::load_right(const GradientInputs& inputs, const Strip& strip, int pair, int count,
                                    float* to) const {
  const int columns = padded(matrix(strip.which).k);
  for (int i = 0; i < count; ++i, to += columns) {
    if (strip.which == Projection::kDown) {
      inputs.h.load(pair + i, 0, columns, to);
    } else {
      inputs.hidden.load(routing_.token_of_pair()[pair + i], {0, columns, shape_.hidden}, to);
    }
  }
}

}  // namespace kt
