#include "core/task_queue.h"

#include <pthread.h>

#include <utility>

namespace kt {

TaskQueue::~TaskQueue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_arrived_.notify_all();
  if (consumer_.joinable()) consumer_.join();
}

void TaskQueue::submit(Task task) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!consumer_.joinable()) consumer_ = std::thread([this] { consume(); });
    tasks_.push_back(std::move(task));
    ++unfinished_;
  }
  work_arrived_.notify_one();
}

void TaskQueue::wait(int allowed_pending) noexcept {
  std::unique_lock<std::mutex> lock(mutex_);
  task_finished_.wait(lock, [&] { return unfinished_ <= allowed_pending; });
}

void TaskQueue::sync(int allowed_pending) {
  wait(allowed_pending);
  raise_pending_error();
}

void TaskQueue::raise_pending_error() {
  std::exception_ptr error;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    error = std::exchange(error_, nullptr);
  }
  if (error) std::rethrow_exception(error);
}

int TaskQueue::pending() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return unfinished_;
}

void TaskQueue::consume() {
  pthread_setname_np(pthread_self(), "kt-queue");
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    work_arrived_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      task();
    } catch (...) {
      error = std::current_exception();
    }
    task = nullptr;  // what the task owns goes before anybody is told it has finished
    lock.lock();
    if (error && !error_) error_ = error;
    --unfinished_;
    task_finished_.notify_all();
  }
}

}  // namespace kt
