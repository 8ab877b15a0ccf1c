#include "training/lora.h"

#include <algorithm>

namespace kt {
namespace {

// [rank][columns] and [columns][rank] -> [rank][padded]
void copy_rows(const float* from, int rank, int columns, int padded, float* to) {
  for (int j = 0; j < rank; ++j, from += columns, to += padded) {
    std::fill(std::copy_n(from, columns, to), to + padded, 0.0f);
  }
}

void transpose(const float* from, int rank, int columns, int padded, float* to) {
  for (int c = 0; c < columns; ++c) {
    for (int j = 0; j < rank; ++j) to[size_t{1} * j * padded + c] = from[size_t{1} * c * rank + j];
  }
  for (int j = 0; j < rank; ++j)
    std::fill(to + size_t{1} * j * padded + columns, to + size_t{1} * (j + 1) * padded, 0.0f);
}

}  // namespace

PackedLora::PackedLora(const Lora& lora, const LayerShape& shape, const std::vector<ActiveExpert>& experts,
                       ThreadPools& pools, Buffer& memory)
    : shape_(shape), rank_(lora.rank), scale_(lora.scale), kept_(lora.kept) {
  memory.reserve(experts.size() * floats_per_expert() * sizeof(float));
  first_ = memory.as<float>();
  pools.for_each(static_cast<int>(experts.size()), [&](const Worker&, int index) {
    pack(lora.tensors, experts[index].expert, memory.as<float>() + index * floats_per_expert());
  });
}

PackedLora::Expert PackedLora::of(size_t index) const {
  const float* const hidden = first_ + index * floats_per_expert();
  const float* const intermediate = hidden + 3 * hidden_floats();
  return {hidden,
          hidden + hidden_floats(),
          hidden + 2 * hidden_floats(),
          intermediate,
          intermediate + intermediate_floats(),
          intermediate + 2 * intermediate_floats()};
}

void PackedLora::drop(Projection which, int64_t entry, int first, int columns, float* row) const {
  if (!drops()) return;
  const int live = which == Projection::kDown ? shape_.intermediate : shape_.hidden;
  const uint8_t* const kept = kept_[which] + entry * live + first;
  const int end = std::min(columns, live - first);
  for (int c = 0; c < end; ++c) row[c] = kept[c] != 0 ? row[c] : 0.0f;
}

void PackedLora::pack(const LoraTensors<const float>& tensors, int expert, float* to) const {
  const int hidden = shape_.hidden, intermediate = shape_.intermediate;
  const size_t of_hidden = size_t{1} * expert * rank_ * hidden;
  const size_t of_intermediate = size_t{1} * expert * rank_ * intermediate;
  const int hidden_padded = shape_.hidden_padded(), intermediate_padded = shape_.intermediate_padded();
  copy_rows(tensors.gate_a + of_hidden, rank_, hidden, hidden_padded, to);
  copy_rows(tensors.up_a + of_hidden, rank_, hidden, hidden_padded, to + hidden_floats());
  transpose(tensors.down_b + of_hidden, rank_, hidden, hidden_padded, to + 2 * hidden_floats());
  to += 3 * hidden_floats();
  transpose(tensors.gate_b + of_intermediate, rank_, intermediate, intermediate_padded, to);
  transpose(tensors.up_b + of_intermediate, rank_, intermediate, intermediate_padded, to + intermediate_floats());
  copy_rows(tensors.down_a + of_intermediate, rank_, intermediate, intermediate_padded, to + 2 * intermediate_floats());
}

}  // namespace kt
