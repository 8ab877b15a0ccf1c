#include "operators/registry.h"

#include <stdexcept>
#include <utility>

namespace kt {
namespace {

struct Registered {
  std::string name_space;
  Schema schema;
  OperatorBody body;
};

std::vector<Operator> all_operators() {
  std::vector<Operator> all;
  for (const auto& family :
       {attention_operators, linear_operators, experts_operators, causal_convolution_operators, gated_delta_operators,
        gated_delta_inputs_operators, norms_operators, heads_operators, router_operators, gates_operators,
        embedding_operators, sampling_operators, latent_attention_operators, shared_expert_operators}) {
    for (const Operator& one : family()) all.push_back(one);
  }
  return all;
}

// Fixed once installed: kernels find themselves by their number.
std::vector<Registered>& registered() {
  static std::vector<Registered> all;
  return all;
}

// torch calls a kernel without saying which operator it is, so each has a function of its own.
constexpr int kMostOperators = 96;

template <int kNumber>
void boxed(StackValue* stack, uint64_t, uint64_t) {
  const Registered& one = registered()[kNumber];
  Call call(torch_abi(), one.schema, stack);
  one.body(call);
  call.finish();
}

template <int... kNumbers>
BoxedKernel boxed_kernel(int number, std::integer_sequence<int, kNumbers...>) {
  static constexpr BoxedKernel kKernels[] = {boxed<kNumbers>...};
  return kKernels[number];
}

void require(int error, const std::string& what) {
  if (error != 0) throw std::runtime_error("torch refuses the operator " + what);
}

// torch 2.13, whose rules for ownership call.cc follows.
constexpr uint64_t kBuiltFor = (uint64_t{2} << 56) | (uint64_t{13} << 48);

void register_all(const TorchAbi& torch) {
  for (const Operator& one : all_operators()) {
    const std::string text = one.schema;
    const size_t colons = text.find("::");
    const std::string name_space = text.substr(0, colons);
    const std::string schema = text.substr(colons + 2);
    registered().push_back({name_space, parse_schema(schema), one.body});
    const int number = static_cast<int>(registered().size()) - 1;
    if (number >= kMostOperators) throw std::logic_error("more operators than boxed functions");
    // The libraries live as long as the process: torch keeps what they define only as long as they do.
    LibraryHandle definitions = nullptr, kernels = nullptr;
    require(torch.library_init_fragment(name_space.c_str(), __FILE__, __LINE__, &definitions), text);
    require(torch.library_def(definitions, schema.c_str()), text);
    require(torch.library_init_impl(name_space.c_str(), "CPU", __FILE__, __LINE__, &kernels), text);
    const BoxedKernel kernel = boxed_kernel(number, std::make_integer_sequence<int, kMostOperators>());
    require(torch.library_impl(kernels, registered()[number].schema.name.c_str(), kernel, kBuiltFor), text);
  }
}

}  // namespace

std::vector<std::string> operator_schemas() {
  std::vector<std::string> schemas;
  for (const Operator& one : all_operators()) schemas.push_back(one.schema);
  return schemas;
}

void register_operators() {
  if (registered().empty()) register_all(torch_abi());
}

}  // namespace kt
