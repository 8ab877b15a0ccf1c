// The native operators: the families there are, and their registration with torch.
#pragma once

#include <string>
#include <vector>

#include "operators/call.h"

namespace kt {

using OperatorBody = void (*)(Call&);

// `schema` is torch's, with the namespace in front: "sgl_kernel::rmsnorm_cpu(Tensor input, …) -> Tensor".
struct Operator {
  const char* schema;
  OperatorBody body;
};

// One family per file of this folder.
std::vector<Operator> attention_operators();
std::vector<Operator> linear_operators();
std::vector<Operator> latent_attention_operators();
std::vector<Operator> shared_expert_operators();
std::vector<Operator> experts_operators();
std::vector<Operator> causal_convolution_operators();
std::vector<Operator> gated_delta_operators();
std::vector<Operator> gated_delta_inputs_operators();
std::vector<Operator> norms_operators();
std::vector<Operator> heads_operators();
std::vector<Operator> router_operators();
std::vector<Operator> gates_operators();
std::vector<Operator> embedding_operators();
std::vector<Operator> sampling_operators();

// Schemas of all native operators.
std::vector<std::string> operator_schemas();

// Registers all of them with the torch of this process, for CPU tensors; once. They compute on the engine given to
// `use_engine`. Throws std::runtime_error where torch lacks what is needed.
void register_operators();

}  // namespace kt
