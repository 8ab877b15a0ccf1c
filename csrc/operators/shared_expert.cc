// The shared expert of DeepSeek's MoE layers, added to what the routed ones gave (doc/operators.md).
#include <stdexcept>

#include "kernels/gates.h"
#include "operators/packed.h"
#include "operators/registry.h"
#include "operators/rows.h"

namespace kt {
namespace {

const GateKernels& gate_kernels() {
  static const GateKernels& chosen =
      first_active<GateKernels>({{kAvx512Features, &kGatesAvx512}, {kAvx2Features, &kGatesAvx2}});
  return chosen;
}

struct SharedExpert {
  std::shared_ptr<Linear> gate_up, down;
  MatrixView x, gates, activated, routed, out;
  float factor = 0;
  GateFn silu = nullptr;
  void (*add_scaled)(const AddScaledArgs&) = nullptr;

  void activate(int64_t token) const {
    const uint8_t* const gate = gates.row(token);
    const int columns = static_cast<int>(activated.columns);
    silu({gate, gate + columns * bytes_of(gates.type), activated.row(token), columns});
  }

  void operator()(Engine& engine) const {
    gate_up->forward(x, gates, nullptr);
    // An element costs about four of a norm's.
    share_rows(engine, x.rows, 4 * activated.columns, [&](int64_t first, int64_t count) {
      for (int64_t token = first; token < first + count; ++token) activate(token);
    });
    down->forward(activated, out, nullptr);
    share_rows(engine, x.rows, out.columns, [&](int64_t first, int64_t count) {
      for (int64_t token = first; token < first + count; ++token) {
        add_scaled({routed.row(token), factor, out.row(token), static_cast<int>(out.columns)});
      }
    });
  }
};

// down(silu(gate) * up) + fused_experts_out * routed_scaling_factor, rounded where layers of their own would round.
// hidden_states stay as they are, also with `inplace`, which allows otherwise.
void shared_expert(Call& call) {
  if (call.flag(6) || call.flag(7) || !call.flag(11)) {
    throw std::invalid_argument(
        "shared_expert_cpu is called with scales, or with weights that are not packed; "
        "expected weights of convert_weight_packed");
  }
  const TensorView x = call.tensor(0), routed = call.tensor(3);
  SharedExpert e;
  e.gate_up = require_packed(call.tensor(1), "w1");
  e.down = require_packed(call.tensor(2), "w2");
  e.x = matrix_view(x, "hidden_states");
  e.routed = matrix_view(routed, "fused_experts_out");
  const int64_t columns = e.down->k();
  if (e.gate_up->rows() != 2 * columns || e.gate_up->k() != e.x.columns || e.down->rows() != e.x.columns) {
    throw std::invalid_argument("shared_expert_cpu got hidden_states " + x.text() + ", w1 of " +
                                std::to_string(e.gate_up->rows()) + " x " + std::to_string(e.gate_up->k()) +
                                " and w2 of " + std::to_string(e.down->rows()) + " x " + std::to_string(columns) +
                                "; expected [tokens, H], [2 I, H] and [H, I]");
  }
  if (routed.type != x.type || e.routed.rows != e.x.rows || e.routed.columns != e.x.columns) {
    throw std::invalid_argument("fused_experts_out is " + routed.text() + "; expected hidden_states' " + x.text());
  }
  const int type = number_type(x, "hidden_states");
  e.gates = matrix_view(call.workspace(x.type, {e.x.rows, 2 * columns}), "gate_up");
  e.activated = matrix_view(call.workspace(x.type, {e.x.rows, columns}), "activated");
  e.out = matrix_view(result_like(call, x), "the output");
  e.factor = static_cast<float>(call.number(4));
  e.silu = gate_kernels().silu[type];
  e.add_scaled = gate_kernels().add_scaled[type];
  call.run(e);
}

}  // namespace

std::vector<Operator> shared_expert_operators() {
  return {
      {"sgl_kernel::shared_expert_cpu(Tensor hidden_states, Tensor w1, Tensor w2, Tensor fused_experts_out, float "
       "routed_scaling_factor, bool inplace, bool use_int8_w8a8, bool use_fp8_w8a16, Tensor? w1_scale, Tensor? "
       "w2_scale, int[]? block_size, bool is_vnni) -> Tensor",
       shared_expert},
  };
}

}  // namespace kt
