// The native calls of one decode step, to be made again without Python (what a graph is on a GPU).
//
// While a recording is open on a thread, every operator called there adds its job, which reads and writes the tensors
// of that call; the recording owns them, so their memory stays where it is. A replay runs the jobs in order: what
// changes from step to step is whatever stands in the memory of the step's inputs.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "operators/torch_abi.h"

namespace kt {

class Engine;

class Recording {
 public:
  using Job = std::function<void(Engine&)>;

  Recording() = default;
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  // The one that is open on this thread, or null.
  static Recording* current();

  // Throws std::runtime_error when another one is open on this thread.
  void open();
  void close();

  void add(Job job) { jobs_.push_back(std::move(job)); }
  // Owns the tensor from now on.
  void hold(TensorHandle tensor) { held_.push_back(tensor); }

  size_t size() const { return jobs_.size(); }
  // Jobs [begin, end), on the calling thread and the engine's.
  void replay(Engine& engine, size_t begin, size_t end) const;

 private:
  std::vector<Job> jobs_;
  std::vector<TensorHandle> held_;
};

}  // namespace kt
