#include "operators/call.h"

#include <cstring>
#include <stdexcept>

namespace kt {
namespace {

std::shared_ptr<Engine>& engine_slot() {
  static std::shared_ptr<Engine> engine;
  return engine;
}

bool is_optional(ArgumentKind kind) {
  switch (kind) {
    case ArgumentKind::kOptionalTensor:
    case ArgumentKind::kOptionalInteger:
    case ArgumentKind::kOptionalNumber:
    case ArgumentKind::kOptionalFlag:
    case ArgumentKind::kOptionalIntegers:
      return true;
    default:
      return false;
  }
}

template <class T>
T from_stack(StackValue value) {
  T result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

}  // namespace

std::shared_ptr<Engine> shared_operator_engine() {
  if (engine_slot() == nullptr) throw std::runtime_error("the CPU operators have no engine; call install first");
  return engine_slot();
}

Engine& operator_engine() { return *shared_operator_engine(); }

void use_engine(std::shared_ptr<Engine> engine) { engine_slot() = std::move(engine); }

Call::Call(const TorchAbi& torch, const Schema& schema, StackValue* stack) : torch_(torch), stack_(stack) {
  arguments_.reserve(schema.arguments.size());
  for (size_t i = 0; i < schema.arguments.size(); ++i) {
    Argument argument{schema.arguments[i], true, stack[i]};
    if (is_optional(argument.kind)) {
      StackValue* const boxed = from_stack<StackValue*>(stack[i]);
      argument.given = boxed != nullptr;
      argument.value = argument.given ? *boxed : 0;
      if (argument.given) torch_.delete_stable_ivalue(boxed);
    }
    arguments_.push_back(argument);
  }
}

Call::~Call() {
  free_arguments();
  for (TensorHandle tensor : results_) torch_.delete_tensor_object(tensor);
  for (TensorHandle tensor : workspaces_) torch_.delete_tensor_object(tensor);
}

void Call::free_arguments() {
  for (const Argument& argument : arguments_) {
    if (!argument.given) continue;
    void* const owned = from_stack<void*>(argument.value);
    switch (argument.kind) {
      case ArgumentKind::kTensor:
      case ArgumentKind::kOptionalTensor:
        torch_.delete_tensor_object(owned);
        break;
      case ArgumentKind::kText:
        torch_.delete_string(owned);
        break;
      case ArgumentKind::kIntegers:
      case ArgumentKind::kOptionalIntegers:
        torch_.delete_list(owned);
        break;
      default:
        break;
    }
  }
  arguments_.clear();
}

TensorHandle Call::handle(int argument) const { return from_stack<void*>(arguments_[argument].value); }

TensorView Call::tensor(int argument) const { return torch_.view(handle(argument)); }

TensorView Call::optional_tensor(int argument) const {
  return arguments_[argument].given ? torch_.view(handle(argument)) : TensorView{};
}

int64_t Call::integer(int argument) const { return from_stack<int64_t>(arguments_[argument].value); }
double Call::number(int argument) const { return from_stack<double>(arguments_[argument].value); }
bool Call::flag(int argument) const { return (arguments_[argument].value & 0xff) != 0; }

std::optional<int64_t> Call::optional_integer(int argument) const {
  return arguments_[argument].given ? std::optional<int64_t>(integer(argument)) : std::nullopt;
}

std::optional<double> Call::optional_number(int argument) const {
  return arguments_[argument].given ? std::optional<double>(number(argument)) : std::nullopt;
}

std::vector<int64_t> Call::integers(int argument) const {
  std::vector<int64_t> result;
  if (!arguments_[argument].given) return result;
  size_t count = 0;
  torch_.list_size(handle(argument), &count);
  for (size_t i = 0; i < count; ++i) {
    StackValue value = 0;
    torch_.list_get_item(handle(argument), i, &value);
    result.push_back(from_stack<int64_t>(value));
  }
  return result;
}

TensorView Call::result(ElementType type, std::initializer_list<int64_t> sizes) {
  return result(type, sizes.begin(), static_cast<int>(sizes.size()));
}

TensorView Call::result(ElementType type, const int64_t* sizes, int dims) {
  results_.push_back(torch_.empty(type, sizes, dims));
  return torch_.view(results_.back());
}

TensorView Call::workspace(ElementType type, std::initializer_list<int64_t> sizes) {
  workspaces_.push_back(torch_.empty(type, sizes.begin(), static_cast<int>(sizes.size())));
  return torch_.view(workspaces_.back());
}

// The recording needs the memory of all tensors of this call for as long as it may be replayed.
void Call::record(Recording::Job job) {
  Recording& recording = *Recording::current();
  const auto hold = [&](TensorHandle tensor) {
    TensorHandle copy = nullptr;
    if (torch_.new_tensor_handle(tensor, &copy) != 0) throw std::runtime_error("torch refuses to share a tensor");
    recording.hold(copy);
  };
  for (size_t i = 0; i < arguments_.size(); ++i) {
    const ArgumentKind kind = arguments_[i].kind;
    const bool is_tensor = kind == ArgumentKind::kTensor || kind == ArgumentKind::kOptionalTensor;
    if (is_tensor && arguments_[i].given) hold(handle(static_cast<int>(i)));
  }
  for (TensorHandle tensor : results_) hold(tensor);
  for (TensorHandle tensor : workspaces_) hold(tensor);
  recording.add(std::move(job));
}

void Call::finish() {
  free_arguments();
  for (size_t i = 0; i < results_.size(); ++i) std::memcpy(&stack_[i], &results_[i], sizeof(StackValue));
  results_.clear();
}

}  // namespace kt
