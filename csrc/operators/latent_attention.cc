// The projections of DeepSeek's latent attention: hidden states to the queries and the key of the absorbed form, and
// its values to those of the heads (doc/operators.md). Numbers are rounded where a layer of its own would round them.
#include <cstring>
#include <stdexcept>

#include "operators/packed.h"
#include "operators/registry.h"
#include "operators/rotation.h"
#include "operators/rows.h"

namespace kt {
namespace {

const NormKernels& norm_kernels() {
  static const NormKernels& chosen =
      first_active<NormKernels>({{kAvx512Features, &kNormsAvx512}, {kAvx2Features, &kNormsAvx2}});
  return chosen;
}

// Columns [first, +count) of a matrix.
MatrixView columns_of(const MatrixView& matrix, int64_t first, int64_t count) {
  const int64_t bytes = first * static_cast<int64_t>(bytes_of(matrix.type));
  return {matrix.data + bytes, matrix.type, matrix.rows, count, matrix.row_bytes};
}

// Heads side by side in rows of `matrix`, `head` columns apart: columns [first, +count) of each.
MatrixBatch heads_of(const MatrixView& matrix, int heads, int64_t head, int64_t first, int64_t count) {
  return {columns_of(matrix, first, count), heads, head * static_cast<int64_t>(bytes_of(matrix.type))};
}

// An RMSNorm of rows, of which `to` may be the same.
struct Norm {
  MatrixView from, to;
  const void* weight;
  float eps;
  void (*kernel)(const NormArgs&);

  void row(int64_t token) const {
    NormArgs args = {};
    args.x = from.row(token);
    args.weight = weight;
    args.y = to.row(token);
    args.rows = 1;
    args.columns = static_cast<int>(from.columns);
    args.eps = eps;
    kernel(args);
  }
};

Norm norm_of(const MatrixView& from, const MatrixView& to, const TensorView& weight, double eps, const char* name) {
  require_vector(weight, from.columns, name);
  const auto kernel = norm_kernels().rms_norm[static_cast<int>(from.type)][number_type(weight, name)];
  return {from, to, weight.data, static_cast<float>(eps), kernel};
}

struct Sizes {
  int64_t tokens, q_rank, kv_rank, rotary, heads, nope;
  int64_t low() const { return q_rank + kv_rank + rotary; }
  int64_t head() const { return nope + rotary; }
};

// What the projections compute with: hidden -> low [q_rank, kv_rank, rotary] -> queries [heads, nope + rotary].
struct Projections {
  std::shared_ptr<Linear> down, up, absorb;
  Sizes sizes;
  MatrixView hidden, low, queries;
  MatrixView q, k, v;  // results
  Norm q_norm, kv_norm;
  Rotation rotation;
  void (*turn)(const HeadArgs&) = nullptr;

  void turn_heads(const MatrixBatch& from, const MatrixBatch& to, int64_t token, const Angles& angles) const {
    turn({from.first.row(token), from.step_bytes, to.first.row(token), to.step_bytes, from.count,
          static_cast<int>(sizes.rotary), nullptr, 0, &angles});
  }
  void norm_and_key(int64_t token) const;
  void turn_queries(int64_t token) const;
  void operator()(Engine& engine) const;
};

void Projections::norm_and_key(int64_t token) const {
  q_norm.row(token);
  kv_norm.row(token);
  std::memcpy(v.row(token), k.row(token), v.columns * bytes_of(v.type));
  Angles angles;
  rotation.at(token, &angles);
  turn_heads({columns_of(low, sizes.q_rank + sizes.kv_rank, sizes.rotary), 1, 0},
             {columns_of(k, sizes.kv_rank, sizes.rotary), 1, 0}, token, angles);
}

void Projections::turn_queries(int64_t token) const {
  const int heads = static_cast<int>(sizes.heads);
  Angles angles;
  rotation.at(token, &angles);
  turn_heads(heads_of(queries, heads, sizes.head(), sizes.nope, sizes.rotary),
             heads_of(q, heads, sizes.kv_rank + sizes.rotary, sizes.kv_rank, sizes.rotary), token, angles);
}

void Projections::operator()(Engine& engine) const {
  const int heads = static_cast<int>(sizes.heads);
  down->forward(hidden, low, nullptr);
  share_rows(engine, sizes.tokens, sizes.low(), [&](int64_t first, int64_t count) {
    for (int64_t token = first; token < first + count; ++token) norm_and_key(token);
  });
  up->forward(columns_of(low, 0, sizes.q_rank), queries, nullptr);
  absorb->forward_batch(heads_of(queries, heads, sizes.head(), 0, sizes.nope),
                        heads_of(q, heads, sizes.kv_rank + sizes.rotary, 0, sizes.kv_rank));
  share_rows(engine, sizes.tokens, sizes.heads * sizes.rotary, [&](int64_t first, int64_t count) {
    for (int64_t token = first; token < first + count; ++token) turn_queries(token);
  });
}

void require_no_scales(Call& call, int int8, int fp8, int packed, const char* name) {
  if (!call.flag(int8) && !call.flag(fp8) && call.flag(packed)) return;
  throw std::invalid_argument(std::string(name) + " is called with " +
                              (call.flag(int8)  ? "int8 weights and scales"
                               : call.flag(fp8) ? "fp8 weights and scales"
                                                : "weights that are not packed") +
                              "; expected weights of convert_weight_packed");
}

// w_kc [heads, kv_rank, nope]; results q [tokens, heads, kv_rank + rotary], k [tokens, 1, kv_rank + rotary] and v
// [tokens, 1, kv_rank], which is k's part.
void qkv_proj_with_rope(Call& call) {
  constexpr const char* kName = "qkv_proj_with_rope_fused_weight";
  require_no_scales(call, 9, 10, 14, kName);
  const TensorView x = call.tensor(0), w_kc = call.tensor(3);
  Projections p;
  p.down = require_packed(call.tensor(1), "qkv_a_proj_weight");
  p.up = require_packed(call.tensor(2), "q_b_proj_weight");
  p.absorb = require_packed(w_kc, "w_kc");
  p.hidden = matrix_view(x, "hidden_states");
  p.sizes = {p.hidden.rows, call.integer(16), call.integer(17), call.integer(18), w_kc.size(0), p.absorb->k()};
  const Sizes& s = p.sizes;
  if (p.down->rows() != s.low() || p.up->rows() != s.heads * s.head() || w_kc.dims != 3 || w_kc.size(1) != s.kv_rank) {
    throw std::invalid_argument(std::string(kName) + " got weights of " + std::to_string(p.down->rows()) + ", " +
                                std::to_string(p.up->rows()) + " rows and w_kc " + w_kc.text() + "; expected " +
                                std::to_string(s.low()) + ", " + std::to_string(s.heads * s.head()) + " rows and [" +
                                std::to_string(s.heads) + ", " + std::to_string(s.kv_rank) + ", " +
                                std::to_string(s.nope) + "]");
  }
  const int type = number_type(x, "hidden_states");
  const int64_t wide = s.kv_rank + s.rotary;
  p.low = matrix_view(call.workspace(x.type, {s.tokens, s.low()}), "low");
  p.queries = matrix_view(call.workspace(x.type, {s.tokens, s.heads * s.head()}), "queries");
  const TensorView q = call.result(x.type, {s.tokens, s.heads, wide});
  p.q = {q.bytes(), x.type, s.tokens, s.heads * wide, s.heads * wide * static_cast<int64_t>(bytes_of(x.type))};
  p.k = matrix_view(call.result(x.type, {s.tokens, 1, wide}), "k");
  p.v = matrix_view(call.result(x.type, {s.tokens, 1, s.kv_rank}), "v");
  const double eps = call.number(8);
  const MatrixView q_low = columns_of(p.low, 0, s.q_rank);
  p.q_norm = norm_of(q_low, q_low, call.tensor(4), eps, "q_a_layernorm_weight");
  p.kv_norm = norm_of(columns_of(p.low, s.q_rank, s.kv_rank), columns_of(p.k, 0, s.kv_rank), call.tensor(5), eps,
                      "kv_a_layernorm_weight");
  p.rotation = rotation(call.tensor(6), call.tensor(7), s.tokens, false);
  if (p.rotation.rotary != s.rotary) {
    throw std::invalid_argument("cos_sin_cache turns " + std::to_string(p.rotation.rotary) +
                                " columns; expected qk_rope_head_dim " + std::to_string(s.rotary));
  }
  p.turn = head_kernels().turn_pairs[type];
  call.run(p);
}

MatrixBatch batch_view(const TensorView& x, const char* name) {
  if (x.dims != 3 || (x.size(2) > 1 && x.stride(2) != 1)) {
    throw std::invalid_argument(std::string(name) + " is " + x.text() + "; expected [B, M, columns side by side]");
  }
  const int64_t bytes = static_cast<int64_t>(bytes_of(x.type));
  return {
      {x.bytes(), x.type, x.size(1), x.size(2), x.stride(1) * bytes}, static_cast<int>(x.size(0)), x.stride(0) * bytes};
}

// out [B, M, N] = mat1 [B, M, K] times the transposed mat2 [B, N, K].
void bmm(Call& call) {
  const TensorView mat2 = call.tensor(2);
  if (!call.flag(3) || call.optional_tensor(4).given()) {
    throw std::invalid_argument(
        "bmm_cpu is called with a scale, or with weights that are not packed; expected "
        "weights of convert_weight_packed");
  }
  const MatrixBatch out = batch_view(call.tensor(0), "out"), x = batch_view(call.tensor(1), "mat1");
  const std::shared_ptr<Linear> linear = require_packed(mat2, "mat2");
  if (mat2.dims != 3 || mat2.size(1) != out.first.columns) {
    throw std::invalid_argument("mat2 is " + mat2.text() + "; expected [" + std::to_string(out.count) + ", " +
                                std::to_string(out.first.columns) + ", " + std::to_string(x.first.columns) + "]");
  }
  call.run([=](Engine&) { linear->forward_batch(x, out); });
}

}  // namespace

std::vector<Operator> latent_attention_operators() {
  return {
      {"sgl_kernel::qkv_proj_with_rope_fused_weight(Tensor hidden_states, Tensor qkv_a_proj_weight, Tensor "
       "q_b_proj_weight, Tensor w_kc, Tensor q_a_layernorm_weight, Tensor kv_a_layernorm_weight, Tensor positions, "
       "Tensor cos_sin_cache, float eps, bool use_int8_w8a8, bool use_fp8_w8a16, Tensor? qkv_a_proj_scale, Tensor? "
       "q_b_proj_scale, Tensor? w_scale, bool is_vnni, int[]? block_size, int q_lora_rank, int kv_lora_rank, int "
       "qk_rope_head_dim) -> (Tensor, Tensor, Tensor)",
       qkv_proj_with_rope},
      {"sgl_kernel::bmm_cpu(Tensor(a!) out, Tensor mat1, Tensor mat2, bool is_vnni, Tensor? scale) -> ()", bmm},
  };
}

}  // namespace kt
