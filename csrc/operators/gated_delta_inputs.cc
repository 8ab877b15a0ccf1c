// Around the gated delta rule: its projections' outputs taken apart, and the gated norm of its result.
#include <algorithm>
#include <cstring>

#include "linear/linear.h"
#include "operators/packed.h"
#include "operators/registry.h"
#include "operators/sequences.h"

namespace kt {
namespace {

constexpr int kMostNormColumns = 1024;
constexpr int kRowsAtOnce = 32;

// How a row of the projection to q, k, v and z is laid out.
enum class Layout { kByKeyHead, kByPart };

struct Split {
  TensorView qkvz, ba, qkv, z, b, a;
  int64_t key_heads, value_heads, keys, values;  // elements of one head

  int64_t per_key_head() const { return value_heads / key_heads; }

  // kByKeyHead: each key head's q, k, and its value heads' v and z stand together.
  void grouped_row(int64_t token) const {
    const int64_t group_values = per_key_head() * values;
    const int64_t group = 2 * keys + 2 * group_values;
    for (int64_t h = 0; h < key_heads; ++h) {
      const int64_t from = token * qkvz.stride(0) + h * group;
      const int64_t row = token * (2 * key_heads * keys + value_heads * values);
      copy(qkvz, from, keys, qkv, row + h * keys);
      copy(qkvz, from + keys, keys, qkv, row + (key_heads + h) * keys);
      copy(qkvz, from + 2 * keys, group_values, qkv, row + 2 * key_heads * keys + h * group_values);
      copy(qkvz, from + 2 * keys + group_values, group_values, z, token * value_heads * values + h * group_values);
      const int64_t gates = token * ba.stride(0) + h * 2 * per_key_head();
      copy(ba, gates, per_key_head(), b, token * value_heads + h * per_key_head());
      copy(ba, gates + per_key_head(), per_key_head(), a, token * value_heads + h * per_key_head());
    }
  }
  // kByPart: all q, all k, all v, all z; all b, all a.
  void contiguous_row(int64_t token) const {
    const int64_t columns = 2 * key_heads * keys + value_heads * values;
    copy(qkvz, token * qkvz.stride(0), columns, qkv, token * columns);
    copy(qkvz, token * qkvz.stride(0) + columns, value_heads * values, z, token * value_heads * values);
    copy(ba, token * ba.stride(0), value_heads, b, token * value_heads);
    copy(ba, token * ba.stride(0) + value_heads, value_heads, a, token * value_heads);
  }

 private:
  static void copy(const TensorView& from, int64_t at, int64_t count, const TensorView& to, int64_t to_at) {
    std::memcpy(address(to, to_at), address(from, at), count * bytes_of(from.type));
  }
};

template <Layout kLayout>
void split(Call& call) {
  Split s{};
  s.qkvz = call.tensor(0), s.ba = call.tensor(1);
  s.key_heads = call.integer(2), s.value_heads = call.integer(3), s.keys = call.integer(4), s.values = call.integer(5);
  const int64_t columns = 2 * s.key_heads * s.keys + s.value_heads * s.values;
  require(s.key_heads > 0 && s.value_heads % s.key_heads == 0, "the heads", s.qkvz, "whole value heads a key head");
  require(s.qkvz.dims == 2 && s.qkvz.stride(1) == 1 && s.qkvz.size(1) == columns + s.value_heads * s.values,
          "mixed_qkvz", s.qkvz, "[tokens, q, k, v and z of all heads]");
  require(s.ba.dims == 2 && s.ba.stride(1) == 1 && s.ba.size(1) == 2 * s.value_heads, "mixed_ba", s.ba,
          "[tokens, 2 * value heads]");
  const int64_t tokens = s.qkvz.size(0);
  s.qkv = call.result(s.qkvz.type, {tokens, columns});
  s.z = call.result(s.qkvz.type, {tokens, s.value_heads, s.values});
  s.b = call.result(s.ba.type, {tokens, s.value_heads});
  s.a = call.result(s.ba.type, {tokens, s.value_heads});
  call.run([s, tokens, columns](Engine& engine) {
    share_out(engine, static_cast<int>(tokens), tokens * columns, [&](int token) {
      if constexpr (kLayout == Layout::kByKeyHead) {
        s.grouped_row(token);
      } else {
        s.contiguous_row(token);
      }
    });
  });
}

// [.., columns] each: rms_norm(x) * weight * silu(gate).
void gated_norm(Call& call) {
  const TensorView input = call.tensor(0), weight = call.tensor(1), gate_tensor = call.tensor(2);
  const MatrixView x = matrix_view(input, "the input of a gated norm");
  const MatrixView gate = matrix_view(gate_tensor, "the gate of a gated norm");
  const int type = activation_type(input, "the input of a gated norm");
  require(gate.type == x.type && gate.rows == x.rows && gate.columns == x.columns, "the gate of a gated norm",
          gate_tensor, "the input's shape and type");
  require(weight.dims == 1 && weight.stride(0) == 1 && weight.size(0) == x.columns && x.columns <= kMostNormColumns,
          "the weight of a gated norm", weight, "as many elements as a row has, at most 1024");
  const int weight_type = activation_type(weight, "the weight of a gated norm");
  const MatrixView out = matrix_view(call.result(input.type, input.sizes.data(), input.dims), "out");
  const float epsilon = static_cast<float>(call.number(3));
  call.run([=](Engine& engine) {
    const int pieces = static_cast<int>((x.rows + kRowsAtOnce - 1) / kRowsAtOnce);
    share_out(engine, pieces, x.rows * x.columns * 12, [&](int piece) {
      alignas(64) float widened[kMostNormColumns];
      gated_delta_kernels().widen[weight_type](weight.data, widened, x.columns);
      const int64_t first = piece * kRowsAtOnce, bytes = bytes_of(x.type);
      gated_delta_kernels().gated_norm[type]({static_cast<int>(std::min<int64_t>(kRowsAtOnce, x.rows - first)),
                                              static_cast<int>(x.columns), epsilon, widened, x.row(first),
                                              gate.row(first), out.row(first), x.row_bytes / bytes,
                                              gate.row_bytes / bytes, out.row_bytes / bytes});
    });
  });
}

// Both projections of one input.
void input_projections(Call& call) {
  const TensorView hidden = call.tensor(0);
  const MatrixView x = matrix_view(hidden, "hidden states");
  const std::shared_ptr<Linear> qkvz = require_packed(call.tensor(1), "in_proj_qkvz");
  const std::shared_ptr<Linear> ba = require_packed(call.tensor(2), "in_proj_ba");
  const MatrixView to_qkvz = matrix_view(call.result(hidden.type, {x.rows, qkvz->rows()}), "out");
  const MatrixView to_ba = matrix_view(call.result(hidden.type, {x.rows, ba->rows()}), "out");
  call.run([=](Engine&) {
    qkvz->forward(x, to_qkvz, nullptr);
    ba->forward(x, to_ba, nullptr);
  });
}

}  // namespace

std::vector<Operator> gated_delta_inputs_operators() {
  return {
      {"sgl_kernel::fused_qkvzba_split_reshape_cat_cpu(Tensor mixed_qkvz, Tensor mixed_ba, int num_heads_qk, int "
       "num_heads_v, int head_qk, int head_v) -> (Tensor, Tensor, Tensor, Tensor)",
       split<Layout::kByKeyHead>},
      {"sgl_kernel::fused_qkvzba_split_reshape_cat_contiguous_cpu(Tensor mixed_qkvz, Tensor mixed_ba, int "
       "num_heads_qk, int num_heads_v, int head_qk, int head_v) -> (Tensor, Tensor, Tensor, Tensor)",
       split<Layout::kByPart>},
      {"sgl_kernel::fused_rmsnorm_gated_cpu(Tensor input, Tensor weight, Tensor gate, float eps) -> Tensor",
       gated_norm},
      {"sgl_kernel::fused_input_proj_cpu(Tensor hidden_states, Tensor qkvz_weight, Tensor ba_weight, bool is_vnni) -> "
       "(Tensor, Tensor)",
       input_projections},
  };
}

}  // namespace kt
