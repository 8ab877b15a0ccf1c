// Choice of experts (doc/operators.md).
#include "kernels/router.h"

#include <stdexcept>

#include "operators/registry.h"
#include "operators/rows.h"

namespace kt {
namespace {

const RouterKernels& kernels() {
  static const RouterKernels& chosen =
      first_active<RouterKernels>({{kAvx512Features, &kRouterAvx512}, {kAvx2Features, &kRouterAvx2}});
  return chosen;
}

using RouteFn = void (*)(const RouterArgs&);
using RouteTable = const RouteFn (&)[kNumberTypes];

// How a model chooses; `groups` 1: from all experts.
struct Choice {
  int64_t chosen;
  bool renormalise;
  int64_t groups = 1;
  int64_t groups_kept = 1;
  GroupRank rank = GroupRank::kBest;
  float scale = 1;
};

void check(const Choice& choice, const TensorView& logits, int64_t experts) {
  const auto refuse = [&](const std::string& what) {
    throw std::invalid_argument("a router with logits " + logits.text() + " " + what);
  };
  if (logits.dims != 2 || experts < 1 || experts > kMostRouted) {
    refuse("was called; expected [tokens, 1 to " + std::to_string(kMostRouted) + " experts]");
  }
  if (choice.groups < 1 || experts % choice.groups != 0 || choice.groups_kept < 1 ||
      choice.groups_kept > choice.groups) {
    refuse("keeps " + std::to_string(choice.groups_kept) + " of " + std::to_string(choice.groups) +
           " groups; expected a divisor of the experts and at most as many kept");
  }
  const int64_t most = std::min<int64_t>(kMostChosen, experts / choice.groups * choice.groups_kept);
  if (choice.chosen < 1 || choice.chosen > most) {
    refuse("chooses " + std::to_string(choice.chosen) + " experts; expected 1 to " + std::to_string(most));
  }
}

void route(Call& call, RouteTable table, const TensorView& bias, const Choice& choice) {
  const TensorView logits = call.tensor(1);
  const int64_t experts = logits.dims == 2 ? logits.size(1) : 0;
  check(choice, logits, experts);
  if (bias.given()) require_vector(bias, experts, "correction_bias");
  const MatrixView rows = matrix_view(logits, "gating_output");
  const TensorView weights = call.result(ElementType::kF32, {rows.rows, choice.chosen});
  const TensorView ids = call.result(ElementType::kI32, {rows.rows, choice.chosen});
  const RouteFn kernel = table[number_type(logits, "gating_output")];
  call.run([=](Engine& engine) {
    share_rows(engine, rows.rows, experts * choice.chosen, [&](int64_t first, int64_t count) {
      float wide[kMostRouted];
      if (bias.given()) kernels().widen[static_cast<int>(bias.type)](bias.data, wide, static_cast<int>(experts));
      kernel({rows.row(first), rows.row_bytes, count, static_cast<int>(experts), bias.given() ? wide : nullptr,
              static_cast<int>(choice.groups), static_cast<int>(choice.groups_kept), choice.rank,
              static_cast<int>(choice.chosen), choice.renormalise, choice.scale,
              weights.as<float>() + first * choice.chosen, ids.as<int32_t>() + first * choice.chosen});
    });
  });
}

void topk_softmax(Call& call) {
  route(call, kernels().softmax, call.optional_tensor(4), {call.integer(2), call.flag(3)});
}

void topk_sigmoid(Call& call) {
  route(call, kernels().sigmoid, call.optional_tensor(4), {call.integer(2), call.flag(3)});
}

void refuse_shared_experts(int64_t count, const char* name) {
  if (count == 0) return;
  throw std::invalid_argument(std::string(name) + " got num_fused_shared_experts=" + std::to_string(count) +
                              "; expected 0");
}

// The scaling factor counts where shared experts are fused, that is never.
void grouped_topk(Call& call) {
  refuse_shared_experts(call.integer(6), "grouped_topk_cpu");
  route(call, kernels().softmax, TensorView{},
        {call.integer(2), call.flag(3), call.integer(4), call.integer(5), GroupRank::kBest});
}

void biased_grouped_topk(Call& call) {
  refuse_shared_experts(call.integer(7), "biased_grouped_topk_cpu");
  const float scale = static_cast<float>(call.optional_number(8).value_or(1.0));
  route(call, kernels().sigmoid, call.tensor(2),
        {call.integer(3), call.flag(4), call.integer(5), call.integer(6), GroupRank::kBestTwo, scale});
}

}  // namespace

std::vector<Operator> router_operators() {
  return {
      {"sgl_kernel::topk_softmax_cpu(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize, Tensor? "
       "correction_bias=None) -> (Tensor, Tensor)",
       topk_softmax},
      {"sgl_kernel::topk_sigmoid_cpu(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize, Tensor? "
       "correction_bias=None) -> (Tensor, Tensor)",
       topk_sigmoid},
      {"sgl_kernel::grouped_topk_cpu(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize, int "
       "num_expert_group, int topk_group, int num_fused_shared_experts, float? routed_scaling_factor, Tensor? "
       "num_token_non_padded) -> (Tensor, Tensor)",
       grouped_topk},
      {"sgl_kernel::biased_grouped_topk_cpu(Tensor hidden_states, Tensor gating_output, Tensor correction_bias, int "
       "topk, bool renormalize, int num_expert_group, int topk_group, int num_fused_shared_experts, float? "
       "routed_scaling_factor, Tensor? num_token_non_padded) -> (Tensor, Tensor)",
       biased_grouped_topk},
  };
}

}  // namespace kt
