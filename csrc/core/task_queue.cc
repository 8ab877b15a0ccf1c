#include "core/task_queue.h"

#include <pthread.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace kt {

struct TaskQueue::State {
  std::mutex mutex;
  std::condition_variable work_arrived;
  std::condition_variable task_finished;
  std::deque<Task> tasks;
  int64_t submitted = 0;
  int64_t finished = 0;  // first in, first out: the first `finished` of those submitted
  bool stopping = false;
  std::exception_ptr error;
};

TaskQueue::TaskQueue() : state_(std::make_shared<State>()) {}

TaskQueue::~TaskQueue() {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work_arrived.notify_all();
  if (!consumer_.joinable()) return;
  if (consumer_.get_id() == std::this_thread::get_id()) {
    consumer_.detach();
  } else {
    consumer_.join();
  }
}

void TaskQueue::submit(Task task) {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    if (!consumer_.joinable()) consumer_ = std::thread([state = state_] { consume(state); });
    state_->tasks.push_back(std::move(task));
    ++state_->submitted;
  }
  state_->work_arrived.notify_one();
}

void TaskQueue::submit_or_fail(Task task) noexcept {
  try {
    submit(std::move(task));
  } catch (...) {
    std::lock_guard<std::mutex> lock(state_->mutex);
    if (!state_->error) state_->error = std::current_exception();
  }
}

void TaskQueue::wait(int allowed_pending) noexcept {
  std::unique_lock<std::mutex> lock(state_->mutex);
  const int64_t enough = state_->submitted - allowed_pending;
  state_->task_finished.wait(lock, [&] { return state_->finished >= enough; });
}

void TaskQueue::sync(int allowed_pending) {
  if (allowed_pending < 0) {
    throw std::invalid_argument("sync may leave " + std::to_string(allowed_pending) +
                                " tasks pending; expected 0 or more");
  }
  wait(allowed_pending);
  raise_pending_error();
}

void TaskQueue::raise_pending_error() {
  std::exception_ptr error;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    error = std::exchange(state_->error, nullptr);
  }
  if (error) std::rethrow_exception(error);
}

int TaskQueue::pending() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return static_cast<int>(state_->submitted - state_->finished);
}

void TaskQueue::consume(const std::shared_ptr<State>& state) {
  pthread_setname_np(pthread_self(), "kt-queue");
  std::unique_lock<std::mutex> lock(state->mutex);
  while (true) {
    state->work_arrived.wait(lock, [&] { return state->stopping || !state->tasks.empty(); });
    if (state->tasks.empty()) return;
    Task task = std::move(state->tasks.front());
    state->tasks.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      task();
    } catch (...) {
      error = std::current_exception();
    }
    task = nullptr;  // what the task owns goes before anybody is told it has finished
    lock.lock();
    if (error && !state->error) state->error = error;
    ++state->finished;
    state->task_finished.notify_all();
  }
}

}  // namespace kt
