#include "training/lora_gradients.h"

namespace kt {
namespace {

// 32 rows of so many columns are 32 KiB of fp32.
constexpr int kStripColumns = 256;

int strips(int columns) { return (columns + kStripColumns - 1) / kStripColumns; }

}  // namespace

LoraGradientPieces::LoraGradientPieces(Engine& engine, const LayerShape& shape, const Routing& routing,
                                       const PackedLora& lora, const LoraTensors<float>& gradients)
    : engine_(engine),
      shape_(shape),
      routing_(routing),
      lora_(lora),
      rank_(lora.rank()),
      gradients_(gradients),
      kernels_(training_row_kernels()),
      hidden_strips_(strips(shape.hidden_padded())),
      intermediate_strips_(strips(shape.intermediate_padded())) {
  const ThreadPools& pools = engine.pools();
  for (int worker = 0; worker < pools.threads(); ++worker) {
    const int node = pools.node_of(pools.subpool_of(worker));
    engine.scratch(worker).row.reserve(kRowsPerBlock * (kStripColumns + rank_) * sizeof(float), node);
    engine.scratch(worker).sum.reserve(3 * sums_floats() * sizeof(float), node);
  }
}

size_t LoraGradientPieces::sums_floats() const { return rank_ * kStripColumns; }

void LoraGradientPieces::compute(const GradientInputs& inputs, const Worker& worker, int piece) const {
  WorkerScratch& scratch = engine_.scratch(worker.index);
  const int per_expert = hidden_strips_ + intermediate_strips_;
  const ActiveExpert& expert = routing_.experts()[piece / per_expert];
  const int strip = piece % per_expert;
  std::fill_n(scratch.sum.as<float>(), 3 * sums_floats(), 0.0f);
  const auto columns = [](int index, int live, int padded) {
    const int first = index * kStripColumns;
    return Columns{first, std::min(kStripColumns, padded - first), live};
  };
  if (strip < hidden_strips_) {
    hidden_strip(inputs, scratch, expert, columns(strip, shape_.hidden, shape_.hidden_padded()));
  } else {
    intermediate_strip(inputs, scratch, expert,
                       columns(strip - hidden_strips_, shape_.intermediate, shape_.intermediate_padded()));
  }
}

void LoraGradientPieces::hidden_strip(const GradientInputs& inputs, WorkerScratch& scratch, const ActiveExpert& expert,
                                      const Columns& columns) const {
  float* const wide = scratch.row.as<float>();
  float* const room = wide + kRowsPerBlock * kStripColumns;
  float* const gate_a = scratch.sum.as<float>();
  float* const up_a = gate_a + sums_floats();
  float* const down_b = up_a + sums_floats();
  const int32_t* const tokens = routing_.token_of_pair().data();
  const int end = expert.first_pair + expert.pairs;
  for (int pair = expert.first_pair; pair < end; pair += kRowsPerBlock) {
    const int rows = std::min(kRowsPerBlock, end - pair);
    const auto load = [&](const TensorRows& tensor) {
      for (int i = 0; i < rows; ++i) tensor.load(tokens[pair + i], columns, wide + i * columns.count);
    };
    load(inputs.hidden);
    drop(Projection::kGate, pair, rows, columns, wide);
    add(inputs.q[Projection::kGate] + pair * rank_, rows, wide, columns, gate_a);
    if (lora_.drops()) load(inputs.hidden);
    drop(Projection::kUp, pair, rows, columns, wide);
    add(inputs.q[Projection::kUp] + pair * rank_, rows, wide, columns, up_a);
    load(inputs.output_gradient);
    add(weighted(inputs.projected[Projection::kDown], pair, rows, room), rows, wide, columns, down_b);
  }
  store_a(gate_a, columns, gradients_.gate_a, expert.expert);
  store_a(up_a, columns, gradients_.up_a, expert.expert);
  store_b(down_b, columns, gradients_.down_b, expert.expert);
}

void LoraGradientPieces::intermediate_strip(const GradientInputs& inputs, WorkerScratch& scratch,
                                            const ActiveExpert& expert, const Columns& columns) const {
  float* const wide = scratch.row.as<float>();
  float* const room = wide + kRowsPerBlock * kStripColumns;
  float* const gate_b = scratch.sum.as<float>();
  float* const up_b = gate_b + sums_floats();
  float* const down_a = up_b + sums_floats();
  const int end = expert.first_pair + expert.pairs;
  for (int pair = expert.first_pair; pair < end; pair += kRowsPerBlock) {
    const int rows = std::min(kRowsPerBlock, end - pair);
    const auto load = [&](const ElementRows& elements) {
      for (int i = 0; i < rows; ++i) elements.load(pair + i, columns.first, columns.count, wide + i * columns.count);
    };
    load(inputs.dgate);
    add(inputs.projected[Projection::kGate] + pair * rank_, rows, wide, columns, gate_b);
    load(inputs.dup);
    add(inputs.projected[Projection::kUp] + pair * rank_, rows, wide, columns, up_b);
    load(inputs.h);
    drop(Projection::kDown, pair, rows, columns, wide);
    add(weighted(inputs.q[Projection::kDown], pair, rows, room), rows, wide, columns, down_a);
  }
  store_b(gate_b, columns, gradients_.gate_b, expert.expert);
  store_b(up_b, columns, gradients_.up_b, expert.expert);
  store_a(down_a, columns, gradients_.down_a, expert.expert);
}

void LoraGradientPieces::drop(Projection which, int pair, int rows, const Columns& columns, float* wide) const {
  for (int i = 0; i < rows; ++i) {
    lora_.drop(which, routing_.entry_of_pair()[pair + i], columns.first, columns.count, wide + i * columns.count);
  }
}

// sums[j, c] += sum over rows of thin[row, j] * wide[row, c]
void LoraGradientPieces::add(const float* thin, int rows, const float* wide, const Columns& columns,
                             float* sums) const {
  const size_t stride = columns.count;
  kernels_.add_outer({thin, 1, rank_, static_cast<int>(rank_), rows, wide, stride, columns.count, sums, kStripColumns});
}

// Thin rows times their pairs' routing weights.
const float* LoraGradientPieces::weighted(const float* thin, int pair, int rows, float* room) const {
  for (int i = 0; i < rows; ++i) {
    const float weight = routing_.weight_of_pair()[pair + i];
    for (size_t j = 0; j < rank_; ++j) room[i * rank_ + j] = weight * thin[(pair + i) * rank_ + j];
  }
  return room;
}

// Columns of [rank, live], and the same of a transposed gradient, [live, rank].
void LoraGradientPieces::store_a(const float* sums, const Columns& columns, float* gradient, int expert) const {
  const int live = std::min(columns.count, columns.live - columns.first);
  float* const to = gradient + size_t{1} * expert * rank_ * columns.live + columns.first;
  for (size_t j = 0; j < rank_; ++j) std::copy_n(sums + j * kStripColumns, live, to + j * columns.live);
}

void LoraGradientPieces::store_b(const float* sums, const Columns& columns, float* gradient, int expert) const {
  const int live = std::min(columns.count, columns.live - columns.first);
  float* const to = gradient + (size_t{1} * expert * columns.live + columns.first) * rank_;
  for (int c = 0; c < live; ++c) {
    for (size_t j = 0; j < rank_; ++j) to[c * rank_ + j] = sums[j * kStripColumns + c];
  }
}

}  // namespace kt
