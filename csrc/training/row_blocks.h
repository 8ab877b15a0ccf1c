// Rows of training as fp32, some at a time: in what the kernels of training compute.
#pragma once

#include <cstring>

#include "kernels/tiers.h"
#include "kernels/training.h"
#include "moe/expert_pieces.h"
#include "moe/layer.h"

namespace kt {

// So many rows of an expert at a time are widened to fp32, which then stay in L2 (2048 columns: 256 KiB).
constexpr int kRowsPerBlock = 32;

inline const TrainingKernels& training_row_kernels() {
  return first_active<TrainingKernels>({{kAvx512Features, &kTrainingAvx512}, {kAvx2Features, &kTrainingAvx2}});
}

inline size_t bytes_of_type(DType type) { return type == DType::kF32 ? 4 : 2; }

inline ExpertPieces row_blocks(const Routing& routing) {
  return ExpertPieces(routing.experts(),
                      [](const ActiveExpert& expert) { return (expert.pairs + kRowsPerBlock - 1) / kRowsPerBlock; });
}

// Rows of a block: pairs [first, +count) of the active expert `index`.
struct RowBlock {
  size_t index;
  int first;
  int count;

  RowBlock(const Routing& routing, const ExpertPieces::Piece& piece)
      : index(piece.expert - routing.experts().data()),
        first(piece.expert->first_pair + piece.index * kRowsPerBlock),
        count(std::min(kRowsPerBlock, piece.expert->pairs - piece.index * kRowsPerBlock)) {}
};

// Columns [first, +count) of a row, which has `live` columns: the others are zero.
struct Columns {
  int first;
  int count;
  int live;
};

// Rows of a caller's tensor, contiguous.
struct TensorRows {
  const uint8_t* data;
  DType type;
  int columns;
  ConvertFn widen;

  TensorRows(const void* tensor, DType dtype, int count, const RowKernels& kernels)
      : data(static_cast<const uint8_t*>(tensor)),
        type(dtype),
        columns(count),
        widen(kernels.widen_rows[static_cast<int>(dtype)]) {}

  void load(int64_t row, const Columns& wanted, float* to) const {
    const int live = std::max(0, std::min(wanted.count, wanted.live - wanted.first));
    widen(data + (row * columns + wanted.first) * bytes_of_type(type), to, live);
    std::fill(to + live, to + wanted.count, 0.0f);
  }
};

// Rows as kernels multiply them: bf16 or fp32, `stride` bytes apart.
struct ElementRows {
  uint8_t* data;
  size_t stride;
  const RowKernels* kernels;

  size_t element() const { return kernels->activation == Activation::kBf16 ? 2 : 4; }
  void load(int64_t row, int first, int count, float* to) const {
    const DType type = kernels->activation == Activation::kBf16 ? DType::kBf16 : DType::kF32;
    kernels->widen_rows[static_cast<int>(type)](data + row * stride + first * element(), to, count);
  }
  void store(const float* from, int64_t row, int first, int count) const {
    const DType type = kernels->activation == Activation::kBf16 ? DType::kBf16 : DType::kF32;
    kernels->store_rows[static_cast<int>(type)](from, data + row * stride + first * element(), count);
  }
};

}  // namespace kt
