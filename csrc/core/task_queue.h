// FIFO of CPU tasks with one consumer thread, started at the first submit. A task that throws does not stop the
// queue: the first error is kept and thrown by the next `sync` (or `raise_pending_error`), once.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace kt {

class TaskQueue {
 public:
  using Task = std::function<void()>;

  TaskQueue() = default;
  ~TaskQueue();  // finishes what was submitted
  TaskQueue(const TaskQueue&) = delete;
  TaskQueue& operator=(const TaskQueue&) = delete;

  void submit(Task task);
  // Blocks until at most `allowed_pending` submitted tasks are unfinished, then throws a kept error if there is one.
  void sync(int allowed_pending = 0);
  // The same without throwing: what a CUDA host function may call.
  void wait(int allowed_pending) noexcept;
  void raise_pending_error();
  int pending() const;

 private:
  void consume();

  mutable std::mutex mutex_;
  std::condition_variable work_arrived_;
  std::condition_variable task_finished_;
  std::deque<Task> tasks_;
  int unfinished_ = 0;
  bool stopping_ = false;
  std::exception_ptr error_;
  std::thread consumer_;
};

}  // namespace kt
