// FIFO of CPU tasks with one consumer thread, started at the first submit. A task that throws does not stop the
// queue: the first error is kept and thrown by the next `sync` (or `raise_pending_error`), once.
#pragma once

#include <functional>
#include <memory>
#include <thread>

namespace kt {

class TaskQueue {
 public:
  using Task = std::function<void()>;

  TaskQueue();
  ~TaskQueue();  // finishes what was submitted
  TaskQueue(const TaskQueue&) = delete;
  TaskQueue& operator=(const TaskQueue&) = delete;

  void submit(Task task);
  // The same from a place that cannot throw, such as a host function: a failure is kept like an error of the task.
  void submit_or_fail(Task task) noexcept;
  // Blocks until all but the last `allowed_pending` of the tasks submitted so far have finished, then throws a kept
  // error if there is one. Tasks that others submit meanwhile are not waited for.
  void sync(int allowed_pending = 0);
  // The same without throwing: what a host function may call.
  void wait(int allowed_pending) noexcept;
  void raise_pending_error();
  int pending() const;

 private:
  struct State;
  static void consume(const std::shared_ptr<State>& state);

  // Shared with the consumer: a task may own the last reference to the owner of this queue, and then the queue is
  // destroyed by its own consumer thread.
  std::shared_ptr<State> state_;
  std::thread consumer_;
};

}  // namespace kt
