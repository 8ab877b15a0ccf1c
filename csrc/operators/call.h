// One call of an operator: its arguments, its results, and what is to be computed.
//
// A body checks its arguments, makes views of them, and gives everything that computes to `run`, which captures the
// views by value: a recorded decode step runs the job again. So a job reads what changes from step to step (positions,
// lengths, cache locations) from the tensors' memory.
#pragma once

#include <array>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "moe/engine.h"
#include "operators/recording.h"
#include "operators/schema.h"
#include "operators/torch_abi.h"

namespace kt {

// The engine of the operators. Throws std::runtime_error before `use_engine`.
Engine& operator_engine();
std::shared_ptr<Engine> shared_operator_engine();
void use_engine(std::shared_ptr<Engine> engine);

class Call {
 public:
  // Owns what the arguments on the stack own.
  Call(const TorchAbi& torch, const Schema& schema, StackValue* stack);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // By position in the schema.
  TensorView tensor(int argument) const;
  TensorView optional_tensor(int argument) const;  // `data` is null for None
  int64_t integer(int argument) const;
  double number(int argument) const;
  bool flag(int argument) const;
  std::optional<int64_t> optional_integer(int argument) const;
  std::optional<double> optional_number(int argument) const;
  std::vector<int64_t> integers(int argument) const;  // empty for None

  // Allocates the next result, contiguous.
  TensorView result(ElementType type, std::initializer_list<int64_t> sizes);
  TensorView result(ElementType type, const int64_t* sizes, int dims);
  // The next result is this tensor.
  void result(TensorHandle tensor) { results_.push_back(tensor); }
  // Memory of this call alone, like a result that nobody sees.
  TensorView workspace(ElementType type, std::initializer_list<int64_t> sizes);

  // job(Engine&), holding the engine's threads.
  template <class Job>
  void run(Job job) {
    run_locking([job = std::move(job)](Engine& engine) {
      const auto lock = engine.exclusive();
      job(engine);
    });
  }
  // The same for jobs that take the engine's threads themselves.
  template <class Job>
  void run_locking(Job job) {
    Engine& engine = operator_engine();
    engine.require_own_process();
    job(engine);
    if (Recording::current() != nullptr) record(std::move(job));
  }

  // Puts the results where torch expects them.
  void finish();

 private:
  struct Argument {
    ArgumentKind kind;
    bool given = false;
    StackValue value = 0;
  };
  TensorHandle handle(int argument) const;
  void record(Recording::Job job);
  void free_arguments();

  const TorchAbi& torch_;
  StackValue* stack_;
  std::vector<Argument> arguments_;
  std::vector<TensorHandle> results_;
  std::vector<TensorHandle> workspaces_;
};

}  // namespace kt
