// The recurrence of the gated delta rule over SGLang's pool of states (kernels/gated_delta.h has the arithmetic).
//
// The pool is declared [slots, value heads, V, K]; the memory of one [slot, head] is ours, and holds K rows of V
// values. A piece of work is one request, one value head and kDeltaColumns columns of its values: it takes these
// columns of the state into its cache, runs all tokens one after the other, and puts them back. So a token meets the
// same arithmetic in a prompt, in any part of one, and when it is decoded.
#include <algorithm>
#include <cmath>

#include "operators/registry.h"
#include "operators/sequences.h"

namespace kt {
namespace {

constexpr float kNormEpsilon = 1e-6f;  // as in transformers
constexpr int kTokensAtOnce = 64;      // gates computed ahead

// Logarithm of the decay, and the share that is written.
float log_decay(float a_log, float a, float dt_bias) {
  const float x = a + dt_bias;
  const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
  return -std::exp(a_log) * softplus;
}
float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// [tokens, heads], either computed already (`g`, `beta`) or what they are computed from.
struct Gates {
  TensorView g, beta;
  TensorView a_log, a, b, dt_bias;

  void read(int64_t token, int head, float* decay, float* share) const {
    if (g.given()) {
      *decay = std::exp(float_at(g, token * g.stride(-2) + head * g.stride(-1)));
      *share = float_at(beta, token * beta.stride(-2) + head * beta.stride(-1));
    } else {
      *decay = std::exp(log_decay(float_at(a_log, head * a_log.stride(0)),
                                  float_at(a, token * a.stride(-2) + head * a.stride(-1)),
                                  float_at(dt_bias, head * dt_bias.stride(0))));
      *share = sigmoid(float_at(b, token * b.stride(-2) + head * b.stride(-1)));
    }
  }
};

// Where states after each token of drafts go: [slots, steps, value heads, V, K].
struct Snapshots {
  TensorView states;   // not given: nowhere
  TensorView slots;    // [requests]
  TensorView parents;  // [requests, steps]; not given: each token follows the one before
};

struct Recurrence {
  TensorView q, k, v, out;  // [1, tokens, heads, dim]
  Gates gates;
  TensorView states, slots, starts;
  bool keeps_states;  // whether the pool moves on
  Snapshots snapshots;
  int type, state_type;

  int heads() const { return static_cast<int>(v.size(2)); }
  int keys() const { return static_cast<int>(k.size(3)); }
  int values() const { return static_cast<int>(v.size(3)); }
  int blocks() const { return (values() + kDeltaColumns - 1) / kDeltaColumns; }
  int pieces() const { return static_cast<int>(slots.size(0)) * heads() * blocks(); }

  void run(Engine& engine) const {
    const int64_t tokens = v.size(1);
    clear_from(index_at(starts, slots.size(0)));
    share_out(engine, pieces(), tokens * heads() * keys() * values() * 3, [this](int piece) {
      const int request = piece / (heads() * blocks());
      compute(request, piece / blocks() % heads(), piece % blocks());
    });
  }

 private:
  // Tokens that belong to no request.
  void clear_from(int64_t token) const {
    const int64_t row = out.size(2) * out.size(3);
    std::fill_n(address(out, token * row), (out.size(1) - token) * row * bytes_of(out.type), uint8_t{0});
  }

  TensorView one_state(const TensorView& pool, int64_t offset) const {
    TensorView state = pool;
    state.data = address(pool, offset);
    return state;
  }

  void load(const uint8_t* from, int columns, float* block) const {
    const auto widen = gated_delta_kernels().widen[state_type];
    const size_t row_bytes = values() * bytes_of(states.type);
    for (int i = 0; i < keys(); ++i) widen(from + i * row_bytes, block + i * kDeltaColumns, columns);
  }
  void store(const float* block, int columns, uint8_t* to) const {
    const auto narrow = gated_delta_kernels().narrow[state_type];
    const size_t row_bytes = values() * bytes_of(states.type);
    for (int i = 0; i < keys(); ++i) narrow(block + i * kDeltaColumns, to + i * row_bytes, columns);
  }

  void compute(int request, int head, int block) const {
    alignas(64) float state[kMostDeltaKeys * kDeltaColumns] = {};
    const int first_column = block * kDeltaColumns;
    const int columns = std::min(kDeltaColumns, values() - first_column);
    const int64_t slot = index_at(slots, request);
    uint8_t* pool = nullptr;
    if (slot >= 0) {
      pool = address(states, slot * states.stride(0) + head * states.stride(1) + first_column);
      load(pool, columns, state);
    }
    const int64_t begin = index_at(starts, request), end = index_at(starts, request + 1);
    if (snapshots.states.given() || state_type != 0) {
      for (int64_t token = begin; token < end; ++token) {
        step_with_snapshots(request, head, first_column, columns, token - begin, begin, state);
      }
    } else {
      for (int64_t token = begin; token < end; token += kTokensAtOnce) {
        steps(head, first_column, columns, token, std::min<int64_t>(kTokensAtOnce, end - token), state);
      }
    }
    if (pool != nullptr && keeps_states) store(state, columns, pool);
  }

  // One token, so that every state between tokens has the pool's precision and can be kept.
  void step_with_snapshots(int request, int head, int first_column, int columns, int64_t step, int64_t begin,
                           float* state) const {
    const TensorView& kept = snapshots.states;
    const int64_t row = kept.given() ? index_at(snapshots.slots, request) : -1;
    const auto place = [&](int64_t of_step) {
      return address(kept, row * kept.stride(0) + of_step * kept.stride(1) + head * kept.stride(2) + first_column);
    };
    if (row >= 0 && step > 0 && snapshots.parents.given()) {
      const TensorView& parents = snapshots.parents;
      const int64_t at = request * parents.stride(0) + step * parents.stride(1);
      const int64_t parent = parents.type == ElementType::kI32 ? parents.as<int32_t>()[at] : parents.as<int64_t>()[at];
      load(place(parent), columns, state);
    }
    steps(head, first_column, columns, begin + step, 1, state);
    if (row >= 0) store(state, columns, place(step));
    if (state_type != 0) round_to_pool(columns, state);
  }

  void round_to_pool(int columns, float* state) const {
    uint16_t rounded[kDeltaColumns];
    for (int i = 0; i < keys(); ++i) {
      gated_delta_kernels().narrow[state_type](state + i * kDeltaColumns, rounded, columns);
      gated_delta_kernels().widen[state_type](rounded, state + i * kDeltaColumns, columns);
    }
  }

  void steps(int head, int first_column, int columns, int64_t token, int64_t count, float* state) const {
    float decay[kTokensAtOnce], beta[kTokensAtOnce];
    for (int64_t i = 0; i < count; ++i) gates.read(token + i, head, decay + i, beta + i);
    const int64_t key_head = head / (heads() / k.size(2));
    const auto at = [&](const TensorView& tensor, int64_t of_head, int64_t column) {
      return address(tensor, token * tensor.stride(1) + of_head * tensor.stride(2) + column);
    };
    DeltaRuleArgs args = {state,
                          keys(),
                          columns,
                          static_cast<int>(count),
                          1.0f / std::sqrt(static_cast<float>(keys())),
                          kNormEpsilon,
                          at(q, key_head, 0),
                          at(k, key_head, 0),
                          at(v, head, first_column),
                          at(out, head, first_column),
                          q.stride(1),
                          k.stride(1),
                          v.stride(1),
                          out.stride(1),
                          decay,
                          beta};
    gated_delta_kernels().delta_rule[type](args);
  }
};

void require_heads(const TensorView& tensor, const char* name) {
  require(tensor.dims == 4 && tensor.size(0) == 1 && (tensor.stride(3) == 1 || tensor.size(3) == 1), name, tensor,
          "[1, tokens, heads, dim] with heads' elements side by side");
}

// Checks what both operators share; the caller adds gates and snapshots.
Recurrence recurrence(Call& call, int q, int k, int v, int states, int slots, int starts) {
  Recurrence r{};
  r.q = call.tensor(q), r.k = call.tensor(k), r.v = call.tensor(v);
  r.states = call.tensor(states), r.slots = call.tensor(slots), r.starts = call.tensor(starts);
  require_heads(r.q, "q"), require_heads(r.k, "k"), require_heads(r.v, "v");
  r.type = activation_type(r.v, "v");
  require(r.q.type == r.v.type && r.k.type == r.v.type, "q", r.q, "the type of k and v");
  require(r.q.size(2) == r.k.size(2) && r.v.size(2) % r.k.size(2) == 0, "k", r.k,
          "as many heads as q, and a divisor of v's");
  require(r.keys() <= kMostDeltaKeys && r.q.size(3) == r.k.size(3), "k", r.k, "at most 256 elements a head, as q");
  r.state_type = activation_type(r.states, "the pool of states");
  const TensorView& s = r.states;
  require(s.dims == 4 && s.size(1) == r.heads() && s.size(2) == r.values() && s.size(3) == r.keys() &&
              s.stride(3) == 1 && s.stride(2) == r.keys(),
          "the pool of states", s, "[slots, value heads, V, K], contiguous in a head");
  require_indices(r.slots, "the states' indices"), require_indices(r.starts, "cu_seqlens");
  require(r.starts.size(0) == r.slots.size(0) + 1, "cu_seqlens", r.starts, "one more than requests");
  r.keeps_states = true;
  r.out = call.result(r.v.type, {1, r.v.size(1), r.v.size(2), r.v.size(3)});
  return r;
}

void require_normalised(bool asked) {
  if (!asked) throw std::invalid_argument("use_qk_l2norm_in_kernel is false; expected true, as all models have it");
}

void chunk_gated_delta_rule(Call& call) {
  Recurrence r = recurrence(call, 0, 1, 2, 5, 8, 6);
  r.gates.g = call.tensor(3), r.gates.beta = call.tensor(4);
  require(r.gates.g.type == ElementType::kF32 && r.gates.g.dims == 3 && r.gates.g.size(2) == r.heads(), "g", r.gates.g,
          "float32 [1, tokens, value heads]");
  require(r.gates.beta.dims == 3 && r.gates.beta.type <= ElementType::kF16, "beta", r.gates.beta,
          "[1, tokens, value heads]");
  require_normalised(call.flag(7));
  call.run([r](Engine& engine) { r.run(engine); });
}

void sigmoid_gating_update(Call& call) {
  Recurrence r = recurrence(call, 2, 3, 4, 7, 8, 9);
  r.gates.a_log = call.tensor(0), r.gates.dt_bias = call.tensor(1);
  r.gates.a = call.tensor(5), r.gates.b = call.tensor(6);
  for (const TensorView* gate : {&r.gates.a, &r.gates.b}) {
    require(gate->type <= ElementType::kF16 && gate->dims >= 2 && gate->size(-1) == r.heads(), "a gate", *gate,
            "[tokens, value heads]");
  }
  require_normalised(call.flag(10));
  if (call.number(11) != 1.0 || call.number(12) != 20.0 || call.flag(13)) {
    throw std::invalid_argument(
        "only the gate of Qwen's gated delta rule is known: softplus with beta 1 and threshold "
        "20, one value a head");
  }
  r.keeps_states = !call.flag(14);
  r.snapshots = {call.optional_tensor(15), call.optional_tensor(16), call.optional_tensor(18)};
  const TensorView& kept = r.snapshots.states;
  if (kept.given()) {
    require(kept.dims == 5 && kept.type == r.states.type && kept.stride(4) == 1 && kept.stride(3) == r.keys(),
            "the buffer of states", kept, "[slots, steps, value heads, V, K] of the pool's type");
    require_indices(r.snapshots.slots, "the buffer's indices");
  }
  call.run([r](Engine& engine) { r.run(engine); });
}

// -> the logarithm of the decay, and beta, float32 [1, tokens, heads]: the prompt's gates have a decoded token's bits.
void gdn_gating(Call& call) {
  const TensorView a_log = call.tensor(0), a = call.tensor(1), b = call.tensor(2), dt_bias = call.tensor(3);
  for (const TensorView* gate : {&a, &b}) {
    require(gate->dims == 2 && gate->type <= ElementType::kF16, "a gate", *gate, "[tokens, value heads]");
  }
  require(a_log.size(0) == a.size(1) && dt_bias.size(0) == a.size(1), "A_log", a_log, "one value a head");
  const int64_t tokens = a.size(0), heads = a.size(1);
  const TensorView g = call.result(ElementType::kF32, {1, tokens, heads});
  const TensorView beta = call.result(ElementType::kF32, {1, tokens, heads});
  // The three exponentials of one gate take as long as about 40 multiply-adds.
  call.run([=](Engine& engine) {
    share_out(engine, static_cast<int>(tokens), tokens * heads * 40, [&](int token) {
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t to = token * heads + head;
        g.as<float>()[to] =
            log_decay(float_at(a_log, head * a_log.stride(0)), float_at(a, token * a.stride(0) + head * a.stride(1)),
                      float_at(dt_bias, head * dt_bias.stride(0)));
        beta.as<float>()[to] = sigmoid(float_at(b, token * b.stride(0) + head * b.stride(1)));
      }
    });
  });
}

}  // namespace

std::vector<Operator> gated_delta_operators() {
  return {
      {"sgl_kernel::fused_gdn_gating_cpu(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)",
       gdn_gating},
      {"sgl_kernel::chunk_gated_delta_rule_cpu(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, "
       "Tensor(a!) initial_state, Tensor cu_seqlens, bool use_qk_l2norm_in_kernel, Tensor initial_state_indices) -> "
       "Tensor",
       chunk_gated_delta_rule},
      {"sgl_kernel::fused_sigmoid_gating_delta_rule_update_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, "
       "Tensor v, Tensor a, Tensor b, Tensor(a!) initial_state_source, Tensor initial_state_indices, Tensor "
       "cu_seqlens, bool use_qk_l2norm_in_kernel, float softplus_beta=1.0, float softplus_threshold=20.0, bool "
       "is_kda=False, bool disable_state_update=False, Tensor(b!)? intermediate_states_buffer=None, Tensor? "
       "intermediate_state_indices=None, int? cache_steps=None, Tensor? retrieve_parent_token=None) -> Tensor",
       sigmoid_gating_update},
  };
}

}  // namespace kt
