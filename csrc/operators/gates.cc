// Gated activations (doc/operators.md).
#include "kernels/gates.h"

#include <stdexcept>

#include "operators/packed.h"
#include "operators/registry.h"
#include "operators/rows.h"

namespace kt {
namespace {

const GateKernels& kernels() {
  static const GateKernels& chosen =
      first_active<GateKernels>({{kAvx512Features, &kGatesAvx512}, {kAvx2Features, &kGatesAvx2}});
  return chosen;
}

using GateTable = const GateFn (&)[kNumberTypes];

// [.., 2 * columns] -> [.., columns]: the first half gates the second. A long row is cut, so that one token's rows keep
// every thread busy.
void act_and_mul(Call& call, GateTable table) {
  const TensorView x = call.tensor(0);
  if (x.dims < 1 || x.size(-1) % 2 != 0) {
    throw std::invalid_argument("a gated activation got " + x.text() + "; expected an even number of columns");
  }
  std::array<int64_t, kMaxDims> sizes = x.sizes;
  sizes[x.dims - 1] /= 2;
  const MatrixView from = matrix_view(x, "input");
  const GateFn kernel = table[number_type(x, "input")];
  const MatrixView to = matrix_view(call.result(x.type, sizes.data(), x.dims), "the output");
  call.run([=](Engine& engine) {
    const int64_t bytes = static_cast<int64_t>(bytes_of(from.type)), columns = to.columns;
    constexpr int64_t kCut = 4096;
    const int64_t cuts = std::max<int64_t>(1, (columns + kCut - 1) / kCut);
    // An element costs about four of a norm's.
    share_rows(engine, to.rows * cuts, 4 * std::min(columns, kCut), [&](int64_t first, int64_t count) {
      for (int64_t piece = first; piece < first + count; ++piece) {
        const int64_t row = piece / cuts, begin = piece % cuts * kCut;
        const uint8_t* const gate = from.row(row) + begin * bytes;
        kernel({gate, gate + columns * bytes, to.row(row) + begin * bytes,
                static_cast<int>(std::min(kCut, columns - begin))});
      }
    });
  });
}

void silu_and_mul(Call& call) { act_and_mul(call, kernels().silu); }
void gelu_and_mul(Call& call) { act_and_mul(call, kernels().gelu); }
void gelu_tanh_and_mul(Call& call) { act_and_mul(call, kernels().gelu_tanh); }

// x *= sigmoid(gate), in place. The gate may be heads of a wider tensor: [tokens, heads, columns] for x [tokens, heads
// * columns].
void fused_sigmoid_mul(Call& call) {
  const TensorView x = call.tensor(0), gate = call.tensor(1);
  if (gate.type != x.type || gate.elements() != x.elements()) {
    throw std::invalid_argument("gate is " + gate.text() + "; expected as many elements and the type of " + x.text());
  }
  const RowBlocks gates = row_blocks(gate, "gate"), rows = row_blocks(x, "input");
  const int64_t heads = rows.block.columns / gates.block.columns;
  if (rows.block.columns != heads * gates.block.columns) {
    throw std::invalid_argument("gate is " + gate.text() + "; expected rows that divide those of " + x.text());
  }
  const GateFn kernel = kernels().sigmoid[number_type(x, "input")];
  call.run([=](Engine& engine) {
    const int64_t columns = gates.block.columns;
    const int64_t bytes = columns * static_cast<int64_t>(bytes_of(rows.block.type));
    share_rows(engine, gates.rows(), 4 * columns, [&](int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; ++i) {
        uint8_t* const own = rows.row(i / heads) + i % heads * bytes;
        kernel({gates.row(i), own, own, static_cast<int>(columns)});
      }
    });
  });
}

// sigmoid(mat1 @ mat2.T + bias) * post_mul_mat with mat2 [1, K], packed: the gate of a shared expert.
void fused_linear_sigmoid_mul(Call& call) {
  const TensorView x = call.tensor(0), bias = call.optional_tensor(2), up = call.tensor(4);
  const std::shared_ptr<Linear> linear = require_packed(call.tensor(1), "mat2 of fused_linear_sigmoid_mul");
  const MatrixView from = matrix_view(x, "mat1"), ups = matrix_view(up, "post_mul_mat");
  if (linear->rows() != 1 || linear->k() != from.columns || ups.rows != from.rows) {
    throw std::invalid_argument("fused_linear_sigmoid_mul got mat1 " + x.text() + ", post_mul_mat " + up.text() +
                                " and a mat2 of " + std::to_string(linear->rows()) +
                                " rows; expected one row, and as many rows of the others");
  }
  if (bias.given() && bias.type != ElementType::kF32) {
    throw std::invalid_argument("bias of fused_linear_sigmoid_mul is " + bias.text() + "; expected float32");
  }
  const MatrixView to = matrix_view(result_like(call, up), "the output");
  const MatrixView logits = matrix_view(call.workspace(ElementType::kF32, {from.rows, 1}), "logits");
  const auto kernel = kernels().row_sigmoid[number_type(up, "post_mul_mat")];
  call.run([=](Engine& engine) {
    linear->forward(from, logits, bias.as<float>());
    share_rows(engine, to.rows, to.columns, [&](int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        kernel({*reinterpret_cast<const float*>(logits.row(row)), ups.row(row), to.row(row),
                static_cast<int>(to.columns)});
      }
    });
  });
}

}  // namespace

std::vector<Operator> gates_operators() {
  return {
      {"sgl_kernel::silu_and_mul_cpu(Tensor input) -> Tensor", silu_and_mul},
      {"sgl_kernel::gelu_and_mul_cpu(Tensor input) -> Tensor", gelu_and_mul},
      {"sgl_kernel::gelu_tanh_and_mul_cpu(Tensor input) -> Tensor", gelu_tanh_and_mul},
      {"sgl_kernel::fused_sigmoid_mul_cpu(Tensor(a!) input, Tensor gate) -> ()", fused_sigmoid_mul},
      {"sgl_kernel::fused_linear_sigmoid_mul(Tensor mat1, Tensor mat2, Tensor? bias, bool is_vnni, Tensor "
       "post_mul_mat) -> Tensor",
       fused_linear_sigmoid_mul},
  };
}

}  // namespace kt
