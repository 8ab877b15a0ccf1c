#include "moe/grouped_gemm.h"

namespace kt {

void GroupedGemm::reserve(WorkerScratch& scratch, int rows, size_t columns, int node) const {
  const Block block = block_of(rows);
  scratch.product.reserve(block.rows * product_stride(columns) * sizeof(float), node);
  scratch.kernel.reserve(kernels_.scratch_bytes(block.rows, block.k), node);
  if (block.rows > 1) scratch.gathered.reserve(block.rows * format_.stride(block.k), node);
}

GroupedGemm::Block GroupedGemm::block_of(int rows) const {
  const Blocking& limits = kernels_.blocking;
  const int block_rows = std::min(rows, limits.rows);
  const size_t columns = limits.bytes / (block_rows * format_.elements(1));
  const int fitting = static_cast<int>(columns) / limits.unit_k * limits.unit_k;
  return {block_rows, std::min(layout_.k_padded, std::max(limits.min_k, fitting))};
}

// By the kernel for few tokens as long as it takes no more than few_calls, shares of nearly equal size.
void GroupedGemm::run(const GemmArgs& block) const {
  if (block.tokens > kernels_.few_calls * kernels_.few_tokens) return kernels_.many(block);
  GemmArgs call = block;
  for (int left = (block.tokens + kernels_.few_tokens - 1) / kernels_.few_tokens, first = 0; left > 0;
       --left, first += call.tokens) {
    call.tokens = (block.tokens - first + left - 1) / left;
    call.a.data = block.a.data + first * block.a.stride;
    call.a.groups = block.a.groups + first * block.a.stride;
    call.c = block.c + first * block.c_stride;
    call.next_panels = left > 1 ? block.panels : block.next_panels;
    kernels_.few(call);
  }
}

// Rows of one block side by side: the rows themselves when they already are, else a copy in the worker's scratch.
ActivationRows GroupedGemm::gathered(WorkerScratch& scratch, const Rows& rows, int first_row, int row_count,
                                     int first_k, int k_count) const {
  const RowTable& table = rows.table;
  const size_t elements_at = format_.elements(first_k);
  const size_t groups_at = table.groups_at + format_.groups(first_k);
  const auto source = [&](int row) {
    return table.data + (rows.index != nullptr ? rows.index[row] : rows.first + row) * table.stride;
  };
  if (rows.index == nullptr || row_count == 1) {
    const uint8_t* row = source(first_row);
    return {row + elements_at, row + groups_at, table.stride};
  }
  const size_t stride = format_.stride(k_count);
  const size_t elements = format_.elements(k_count);
  const size_t groups = format_.groups(k_count);
  uint8_t* const copy = scratch.gathered.data();
  for (int r = 0; r < row_count; ++r) {
    const uint8_t* row = source(first_row + r);
    std::memcpy(copy + r * stride, row + elements_at, elements);
    std::memcpy(copy + r * stride + elements, row + groups_at, groups);
  }
  return {copy, copy + elements, stride};
}

}  // namespace kt
