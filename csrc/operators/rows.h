// What operators that work row by row share: checks of their arguments, and rows shared out to the threads.
#pragma once

#include <algorithm>

#include "kernels/norms.h"
#include "kernels/tiers.h"
#include "moe/engine.h"
#include "operators/call.h"

namespace kt {

// Index of a tensor's type in the tables of kernels. Throws std::invalid_argument for others than fp32, bf16 and fp16.
int number_type(const TensorView& tensor, const char* name);

// A tensor [.., columns] as equal blocks of rows: one block where all rows stand at equal distances, otherwise one per
// index of the first dimension (heads of a slice of qkv). Throws std::invalid_argument where that is not enough.
struct RowBlocks {
  MatrixView block;  // the first
  int64_t blocks;
  int64_t block_bytes;  // from a block to the next
  int64_t rows() const { return blocks * block.rows; }
  uint8_t* row(int64_t i) const { return block.row(i % block.rows) + i / block.rows * block_bytes; }
};
RowBlocks row_blocks(const TensorView& tensor, const char* name);

// Throws std::invalid_argument unless the vector has that many elements, side by side, of a type with kernels.
void require_vector(const TensorView& vector, int64_t elements, const char* name);

// The same sizes, contiguous.
inline TensorView result_like(Call& call, const TensorView& tensor) {
  return call.result(tensor.type, tensor.sizes.data(), tensor.dims);
}

// Elements that the calling thread computes alone: waking another costs 1 to 3 us. (A norm of a row of 2048 bf16 takes
// 0.45 us, so these are 7 us. Zen 4, AVX512, 2026-11-30.)
constexpr int64_t kElementsAlone = 32768;
constexpr int64_t kElementsPerPiece = 16384;

// work(first, count) for ranges of [0, rows), each of `row_elements` elements to compute.
template <class Work>
void share_rows(Engine& engine, int64_t rows, int64_t row_elements, Work work) {
  if (rows <= 0) return;
  if (rows == 1 || rows * row_elements <= kElementsAlone) {
    work(int64_t{0}, rows);
    return;
  }
  const int64_t per_piece = std::max<int64_t>(1, kElementsPerPiece / std::max<int64_t>(1, row_elements));
  const int64_t pieces = (rows + per_piece - 1) / per_piece;
  engine.pools().for_each(static_cast<int>(pieces), [&](const Worker&, int piece) {
    const int64_t first = piece * per_piece;
    work(first, std::min(per_piece, rows - first));
  });
}

}  // namespace kt
