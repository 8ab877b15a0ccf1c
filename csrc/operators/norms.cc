// RMSNorm and LayerNorm of SGLang's models (doc/operators.md).
#include "kernels/norms.h"

#include <cstring>
#include <stdexcept>

#include "operators/registry.h"
#include "operators/rows.h"

namespace kt {
namespace {

const NormKernels& kernels() {
  static const NormKernels& chosen =
      first_active<NormKernels>({{kAvx512Features, &kNormsAvx512}, {kAvx2Features, &kNormsAvx2}});
  return chosen;
}

using NormFn = void (*)(const NormArgs&);
using NormTable = const NormFn (&)[kNumberTypes][kNumberTypes];

// A norm of the rows of x, into y.
struct RowsNorm {
  RowBlocks x, y;
  NormArgs args;

  NormArgs of(int64_t first, int64_t count) const {
    NormArgs part = args;
    part.x = x.row(first);
    part.y = y.row(first);
    part.rows = count;
    return part;
  }
};

RowsNorm rows_norm(const TensorView& x, const TensorView& y, const TensorView& weight, float weight_offset, float eps) {
  const RowBlocks from = row_blocks(x, "input"), to = row_blocks(y, "the output");
  if (weight.given()) require_vector(weight, from.block.columns, "weight");
  NormArgs args = {};
  args.x_stride = from.block.row_bytes;
  args.y_stride = to.block.row_bytes;
  args.weight = weight.data;
  args.weight_offset = weight_offset;
  args.columns = static_cast<int>(from.block.columns);
  args.eps = eps;
  return {from, to, args};
}

// Where x's rows come in blocks, a piece ends with its block.
void run_norm(Call& call, NormFn kernel, const RowsNorm& norm) {
  call.run([=](Engine& engine) {
    const int64_t rows = norm.x.rows(), block = norm.x.block.rows;
    share_rows(engine, rows, norm.args.columns, [&](int64_t first, int64_t count) {
      for (const int64_t end = first + count; first < end;) {
        const int64_t here = std::min(end - first, block - first % block);
        kernel(norm.of(first, here));
        first += here;
      }
    });
  });
}

int type_of_weight(const TensorView& weight) { return weight.given() ? number_type(weight, "weight") : 0; }

void rms_norm_of(Call& call, const TensorView& weight, float weight_offset, double eps) {
  const TensorView x = call.tensor(0);
  const RowsNorm norm = rows_norm(x, result_like(call, x), weight, weight_offset, static_cast<float>(eps));
  run_norm(call, kernels().rms_norm[number_type(x, "input")][type_of_weight(weight)], norm);
}

void rmsnorm(Call& call) { rms_norm_of(call, call.tensor(1), 0, call.number(2)); }
void gemma_rmsnorm(Call& call) { rms_norm_of(call, call.tensor(1), 1, call.number(2)); }
void l2norm(Call& call) { rms_norm_of(call, TensorView{}, 0, call.number(1)); }
void gemma4_rmsnorm(Call& call) {
  const bool with_scale = call.flag(4);
  rms_norm_of(call, with_scale ? call.tensor(1) : TensorView{}, static_cast<float>(call.number(3)), call.number(2));
}

void layernorm(Call& call) {
  const TensorView x = call.tensor(0), weight = call.tensor(1), bias = call.optional_tensor(2);
  RowsNorm norm = rows_norm(x, result_like(call, x), weight, 0, static_cast<float>(call.number(3)));
  if (bias.given()) {
    require_vector(bias, norm.args.columns, "bias");
    if (bias.type != weight.type) {
      throw std::invalid_argument("bias of layernorm_cpu is " + bias.text() + "; expected the weight's " +
                                  name_of(weight.type));
    }
  }
  norm.args.bias = bias.data;
  run_norm(call, kernels().layer_norm[number_type(x, "input")][type_of_weight(weight)], norm);
}

void add_rms_norm_of(Call& call, NormTable table, float weight_offset) {
  const TensorView x = call.tensor(0), residual = call.tensor(1), weight = call.tensor(2);
  if (residual.type != x.type || residual.elements() != x.elements() || residual.size(-1) != x.size(-1)) {
    throw std::invalid_argument("residual is " + residual.text() + "; expected input's " + x.text());
  }
  const RowsNorm norm = rows_norm(x, x, weight, weight_offset, static_cast<float>(call.number(3)));
  const MatrixView sums = matrix_view(residual, "residual");
  if (norm.x.blocks != 1) throw std::invalid_argument("input is " + x.text() + "; expected rows at equal distances");
  const NormFn kernel = table[number_type(x, "input")][number_type(weight, "weight")];
  call.run([=](Engine& engine) {
    share_rows(engine, sums.rows, sums.columns, [&](int64_t first, int64_t count) {
      NormArgs args = norm.of(first, count);
      args.residual = sums.row(first);
      args.residual_stride = sums.row_bytes;
      kernel(args);
    });
  });
}

void fused_add_rmsnorm(Call& call) { add_rms_norm_of(call, kernels().add_rms_norm, 0); }
void gemma_fused_add_rmsnorm(Call& call) { add_rms_norm_of(call, kernels().add_rms_norm_of_rounded, 1); }

void fused_qk_rmsnorm(Call& call) {
  const TensorView q = call.tensor(0), k = call.tensor(1), q_weight = call.tensor(2), k_weight = call.tensor(3);
  const float eps = static_cast<float>(call.number(4));
  const RowsNorm q_norm = rows_norm(q, result_like(call, q), q_weight, 0, eps);
  const RowsNorm k_norm = rows_norm(k, result_like(call, k), k_weight, 0, eps);
  run_norm(call, kernels().rms_norm[number_type(q, "q")][number_type(q_weight, "q_weight")], q_norm);
  run_norm(call, kernels().rms_norm[number_type(k, "k")][number_type(k_weight, "k_weight")], k_norm);
}

// Of this rank's columns: [tokens, 2], q's and k's.
void fused_qk_rmsnorm_sumsq(Call& call) {
  const TensorView q = call.tensor(0), k = call.tensor(1);
  const MatrixView queries = matrix_view(q, "q"), keys = matrix_view(k, "k");
  const TensorView sums = call.result(ElementType::kF32, {queries.rows, 2});
  const auto of_q = kernels().sum_squares[number_type(q, "q")];
  const auto of_k = kernels().sum_squares[number_type(k, "k")];
  call.run([=](Engine& engine) {
    share_rows(engine, queries.rows, queries.columns + keys.columns, [&](int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        float* const sum = sums.as<float>() + 2 * row;
        sum[0] = of_q(queries.row(row), static_cast<int>(queries.columns));
        sum[1] = of_k(keys.row(row), static_cast<int>(keys.columns));
      }
    });
  });
}

void apply_stats(Call& call, const TensorView& x, const TensorView& weight, const float* sums, int64_t ranks) {
  const RowsNorm norm = rows_norm(x, result_like(call, x), weight, 0, static_cast<float>(call.number(6)));
  if (norm.x.blocks != 1) throw std::invalid_argument("q or k is " + x.text() + "; expected [tokens, columns]");
  const auto kernel = kernels().scale_rows[number_type(x, "q or k")][number_type(weight, "the weight")];
  call.run([=](Engine& engine) {
    share_rows(engine, norm.x.rows(), norm.args.columns, [&](int64_t first, int64_t count) {
      const float all_columns = static_cast<float>(norm.args.columns) * static_cast<float>(ranks);
      kernel({norm.of(first, count), sums + 2 * first, 2 * sizeof(float), all_columns});
    });
  });
}

void fused_qk_rmsnorm_apply_from_stats(Call& call) {
  const TensorView q = call.tensor(0), k = call.tensor(1), sums = call.tensor(4);
  const bool contiguous =
      sums.dims == 2 && sums.size(1) == 2 && sums.stride(1) == 1 && (sums.stride(0) == 2 || sums.size(0) <= 1);
  if (sums.type != ElementType::kF32 || !contiguous || sums.size(0) != q.size(0)) {
    throw std::invalid_argument("sum_sq is " + sums.text() + "; expected contiguous float32 [" +
                                std::to_string(q.size(0)) + ", 2]");
  }
  apply_stats(call, q, call.tensor(2), sums.as<float>(), call.integer(5));
  apply_stats(call, k, call.tensor(3), sums.as<float>() + 1, call.integer(5));
}

// [tokens, heads * step] -> [tokens, heads, columns], of each head the columns from `first` on.
TensorView by_heads(const TensorView& x, int64_t step, int64_t first, int64_t columns, const char* name) {
  if (x.dims != 2 || step < 1 || x.size(1) % step != 0 || x.stride(1) != 1) {
    throw std::invalid_argument(std::string(name) + " is " + x.text() + "; expected [tokens, heads * " +
                                std::to_string(step) + "]");
  }
  TensorView heads = x;
  heads.dims = 3;
  heads.sizes = {x.size(0), x.size(1) / step, columns};
  heads.strides = {x.stride(0), step, 1};
  heads.data = x.bytes() + first * static_cast<int64_t>(bytes_of(x.type));
  return heads;
}

// -> [tokens * heads, columns]
void gemma_norm_of_heads(Call& call, const TensorView& heads, const TensorView& weight, double eps) {
  const TensorView result = call.result(heads.type, {heads.size(0) * heads.size(1), heads.size(2)});
  const RowsNorm norm = rows_norm(heads, result, weight, 1, static_cast<float>(eps));
  run_norm(call, kernels().rms_norm[number_type(heads, "q or k")][number_type(weight, "weight")], norm);
}

void fused_qk_gemma_rmsnorm(Call& call) {
  const int64_t columns = call.integer(5);
  gemma_norm_of_heads(call, by_heads(call.tensor(0), columns, 0, columns, "q"), call.tensor(2), call.number(4));
  gemma_norm_of_heads(call, by_heads(call.tensor(1), columns, 0, columns, "k"), call.tensor(3), call.number(4));
}

// q_gate has each head's query and, behind it, its gate.
void fused_qk_gemma_rmsnorm_with_gate(Call& call) {
  const int64_t columns = call.integer(5);
  const TensorView pairs = call.tensor(0);
  gemma_norm_of_heads(call, by_heads(pairs, 2 * columns, 0, columns, "q_gate"), call.tensor(2), call.number(4));
  gemma_norm_of_heads(call, by_heads(call.tensor(1), columns, 0, columns, "k"), call.tensor(3), call.number(4));
  const RowBlocks from = row_blocks(by_heads(pairs, 2 * columns, columns, columns, "q_gate"), "q_gate");
  const TensorView gates = call.result(pairs.type, {from.rows(), columns});
  call.run([=](Engine& engine) {
    const size_t row_bytes = static_cast<size_t>(columns) * bytes_of(gates.type);
    share_rows(engine, from.rows(), columns, [&](int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; ++i) {
        std::memcpy(gates.bytes() + i * row_bytes, from.row(i), row_bytes);
      }
    });
  });
}

}  // namespace

std::vector<Operator> norms_operators() {
  return {
      {"sgl_kernel::rmsnorm_cpu(Tensor input, Tensor weight, float eps) -> Tensor", rmsnorm},
      {"sgl_kernel::gemma_rmsnorm_cpu(Tensor input, Tensor weight, float eps) -> Tensor", gemma_rmsnorm},
      {"sgl_kernel::gemma3_rmsnorm_cpu(Tensor input, Tensor weight, float eps) -> Tensor", gemma_rmsnorm},
      {"sgl_kernel::gemma4_rmsnorm_cpu(Tensor input, Tensor weight, float eps, float scale_shift, bool with_scale) -> "
       "Tensor",
       gemma4_rmsnorm},
      {"sgl_kernel::l2norm_cpu(Tensor input, float eps) -> Tensor", l2norm},
      {"sgl_kernel::layernorm_cpu(Tensor input, Tensor weight, Tensor? bias, float eps) -> Tensor", layernorm},
      {"sgl_kernel::fused_add_rmsnorm_cpu(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps) -> ()",
       fused_add_rmsnorm},
      {"sgl_kernel::gemma_fused_add_rmsnorm_cpu(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps) -> ()",
       gemma_fused_add_rmsnorm},
      {"sgl_kernel::fused_qk_rmsnorm_cpu(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps) -> (Tensor, "
       "Tensor)",
       fused_qk_rmsnorm},
      {"sgl_kernel::fused_qk_rmsnorm_sumsq_cpu(Tensor q, Tensor k) -> Tensor", fused_qk_rmsnorm_sumsq},
      {"sgl_kernel::fused_qk_rmsnorm_apply_from_stats_cpu(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, "
       "Tensor sum_sq, int world_size, float eps) -> (Tensor, Tensor)",
       fused_qk_rmsnorm_apply_from_stats},
      {"sgl_kernel::fused_qk_gemma_rmsnorm_cpu(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, int "
       "head_dim) -> (Tensor, Tensor)",
       fused_qk_gemma_rmsnorm},
      {"sgl_kernel::fused_qk_gemma_rmsnorm_with_gate_cpu(Tensor q_gate, Tensor k, Tensor q_weight, Tensor k_weight, "
       "float eps, int head_dim, int num_head) -> (Tensor, Tensor, Tensor)",
       fused_qk_gemma_rmsnorm_with_gate},
  };
}

}  // namespace kt
