// Heads of queries and keys: RMSNorm of each head, rotation by the token's position (doc/operators.md).
#include <stdexcept>

#include "operators/registry.h"
#include "operators/rotation.h"
#include "operators/rows.h"

namespace kt {
namespace {

// [tokens, heads * columns] or [tokens, heads, columns].
struct HeadsView {
  uint8_t* data;
  int64_t tokens;
  int64_t token_bytes;  // from a token to the next
  int heads;
  int64_t head_bytes;
};

HeadsView heads_view(const TensorView& x, int64_t columns, const char* name) {
  const auto refuse = [&](const std::string& expected) {
    throw std::invalid_argument(std::string(name) + " is " + x.text() + "; expected " + expected);
  };
  const int64_t bytes = static_cast<int64_t>(bytes_of(x.type));
  if (columns < 1 || columns > kLargestHead) {
    refuse("heads of 1 to " + std::to_string(kLargestHead) + " columns, not " + std::to_string(columns));
  }
  if (x.dims < 2 || x.dims > 3 || (x.size(-1) > 1 && x.stride(-1) != 1)) refuse("[tokens, heads (,) columns]");
  const int64_t last = x.size(-1);
  if (x.dims == 2) {
    if (last % columns != 0) refuse("heads of " + std::to_string(columns) + " columns");
    return {x.bytes(), x.size(0), x.stride(0) * bytes, static_cast<int>(last / columns), columns * bytes};
  }
  if (last != columns) refuse("heads of " + std::to_string(columns) + " columns");
  return {x.bytes(), x.size(0), x.stride(0) * bytes, static_cast<int>(x.size(1)), x.stride(1) * bytes};
}

// One of queries and keys.
struct Turned {
  HeadsView from, to;
  int columns;
  TensorView weight;  // of the norm, or not given
  float eps;
  void (*kernel)(const HeadArgs&);

  // `wide`: the weight in fp32.
  void token(int64_t token, const float* wide, const Angles& angles) const {
    kernel({from.data + token * from.token_bytes, from.head_bytes, to.data + token * to.token_bytes, to.head_bytes,
            from.heads, columns, weight.given() ? wide : nullptr, eps, &angles});
  }
  void widen_weight(float* wide) const {
    if (weight.given()) head_kernels().widen[static_cast<int>(weight.type)](weight.data, wide, columns);
  }
};

Turned turned(const TensorView& from, const TensorView& to, int64_t columns, const char* name, bool halves) {
  const int type = number_type(from, name);
  return {heads_view(from, columns, name),
          heads_view(to, columns, name),
          static_cast<int>(columns),
          TensorView{},
          0,
          halves ? head_kernels().turn_halves[type] : head_kernels().turn_pairs[type]};
}

Turned normed(const TensorView& x, const TensorView& weight, double eps, const char* name, bool halves) {
  Turned result = turned(x, x, weight.elements(), name, halves);
  require_vector(weight, result.columns, "the weight of a norm of heads");
  result.weight = weight;
  result.eps = static_cast<float>(eps);
  return result;
}

void turn(Call& call, const Turned& queries, const Turned& keys, const Rotation& rotation) {
  if (queries.from.tokens != keys.from.tokens) {
    throw std::invalid_argument("q has " + std::to_string(queries.from.tokens) + " tokens and k " +
                                std::to_string(keys.from.tokens) + "; expected as many");
  }
  if (rotation.rotary > queries.columns || rotation.rotary > keys.columns) {
    throw std::invalid_argument("cos_sin_cache turns " + std::to_string(rotation.rotary) +
                                " columns; expected at most a head's " +
                                std::to_string(std::min(queries.columns, keys.columns)));
  }
  call.run([=](Engine& engine) {
    const int64_t elements = int64_t{queries.from.heads} * queries.columns + int64_t{keys.from.heads} * keys.columns;
    share_rows(engine, queries.from.tokens, elements, [&](int64_t first, int64_t count) {
      float q_weight[kLargestHead], k_weight[kLargestHead];
      queries.widen_weight(q_weight);
      keys.widen_weight(k_weight);
      Angles angles;
      for (int64_t token = first; token < first + count; ++token) {
        rotation.at(token, &angles);
        queries.token(token, q_weight, angles);
        keys.token(token, k_weight, angles);
      }
    });
  });
}

void rotary_embedding(Call& call) {
  const TensorView q = call.tensor(1), k = call.tensor(2);
  const int64_t columns = call.integer(3);
  const bool halves = call.flag(5);
  const Turned queries = turned(q, result_like(call, q), columns, "query", halves);
  const Turned keys = turned(k, result_like(call, k), columns, "key", halves);
  turn(call, queries, keys, rotation(call.tensor(0), call.tensor(4), queries.from.tokens, halves));
}

void fused_qk_norm(Call& call) {
  const double eps = call.number(4);
  turn(call, normed(call.tensor(0), call.tensor(2), eps, "q", true),
       normed(call.tensor(1), call.tensor(3), eps, "k", true), Rotation{});
}

void fused_qk_norm_rope(Call& call) {
  const double eps = call.number(4);
  const bool halves = call.flag(5);
  const Turned queries = normed(call.tensor(0), call.tensor(2), eps, "q", halves);
  const Turned keys = normed(call.tensor(1), call.tensor(3), eps, "k", halves);
  const Rotation by = rotation(call.tensor(6), call.tensor(7), queries.from.tokens, halves);
  if (by.rotary != call.integer(8)) {
    throw std::invalid_argument("rotary_dim is " + std::to_string(call.integer(8)) + "; expected the " +
                                std::to_string(by.rotary) + " columns of cos_sin_cache");
  }
  turn(call, queries, keys, by);
}

}  // namespace

std::vector<Operator> heads_operators() {
  return {
      {"sgl_kernel::rotary_embedding_cpu(Tensor positions, Tensor query, Tensor key, int head_size, Tensor "
       "cos_sin_cache, bool is_neox) -> (Tensor, Tensor)",
       rotary_embedding},
      {"sgl_kernel::fused_qk_norm_cpu(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, float eps) -> ()",
       fused_qk_norm},
      {"sgl_kernel::fused_qk_norm_rope_cpu(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, float eps, "
       "bool is_neox, Tensor positions, Tensor cos_sin_cache, int rotary_dim) -> ()",
       fused_qk_norm_rope},
  };
}

}  // namespace kt
