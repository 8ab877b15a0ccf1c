// Rows of an embedding by the tokens' ids (doc/operators.md).
#include <cstring>
#include <stdexcept>

#include "operators/registry.h"
#include "operators/rows.h"

namespace kt {
namespace {

int64_t id_at(const TensorView& ids, int64_t i) {
  return ids.type == ElementType::kI64 ? ids.as<int64_t>()[i] : ids.as<int32_t>()[i];
}

// ids [..] int64 or int32, weight [rows, columns] of any type -> [.., columns]
void embedding(Call& call) {
  const TensorView ids = call.tensor(0), weight = call.tensor(1);
  bool contiguous = true;
  int64_t stride = 1;
  for (int d = ids.dims - 1; d >= 0; --d) {
    contiguous = contiguous && (ids.size(d) == 1 || ids.stride(d) == stride);
    stride *= ids.size(d);
  }
  const bool integers = ids.type == ElementType::kI64 || ids.type == ElementType::kI32;
  if (!integers || !contiguous || ids.dims >= kMaxDims || weight.dims != 2) {
    throw std::invalid_argument("an embedding got ids " + ids.text() + " and weight " + weight.text() +
                                "; expected contiguous int64 or int32, and [rows, columns]");
  }
  std::array<int64_t, kMaxDims> sizes = ids.sizes;
  sizes[ids.dims] = weight.size(1);
  const MatrixView rows = matrix_view(weight, "weight");
  const TensorView out = call.result(weight.type, sizes.data(), ids.dims + 1);
  call.run([=](Engine& engine) {
    const size_t row_bytes = static_cast<size_t>(rows.columns) * bytes_of(rows.type);
    share_rows(engine, ids.elements(), rows.columns, [&](int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; ++i) {
        const int64_t id = id_at(ids, i);
        if (id < 0 || id >= rows.rows) {
          throw std::invalid_argument("a token has the id " + std::to_string(id) + "; expected 0 to " +
                                      std::to_string(rows.rows - 1) + ", which the embedding has");
        }
        std::memcpy(out.bytes() + i * row_bytes, rows.row(id), row_bytes);
      }
    });
  });
}

}  // namespace

std::vector<Operator> embedding_operators() {
  return {{"kt_kernel::embedding(Tensor ids, Tensor weight) -> Tensor", embedding}};
}

}  // namespace kt
