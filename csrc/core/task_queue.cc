#include "core/task_queue.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "core/fault.h"

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;

// How often the consumer looks at the mailboxes of a replay that has asked for nothing for long.
constexpr std::chrono::microseconds kLookEvery{50};

// The words are looked at more often than the clock.
constexpr int kPausesPerLook = 16;

// A task, and the mailbox it came from, if any.
struct Entry {
  TaskQueue::Task task;
  Caller caller;
  std::shared_ptr<Mailbox> mailbox;
  uint32_t number = 0;
};

// A mailbox as the consumer sees it without the lock: its words stay in place for the life of the process.
struct Watched {
  const SignalWords* words;
  uint32_t taken;
};

}  // namespace

struct TaskQueue::State {
  explicit State(Spinning how) : spinning(how) {}

  const Spinning spinning;
  std::mutex mutex;
  std::condition_variable work_arrived;
  std::condition_variable task_finished;
  std::deque<Entry> tasks;
  int64_t submitted = 0;
  int64_t finished = 0;  // first in, first out: the first `finished` of those submitted
  bool stopping = false;
  std::exception_ptr error;
  std::vector<std::shared_ptr<Mailbox>> mailboxes;

  // For the consumer, which spins without the lock.
  std::atomic<uint32_t> news{0};  // goes up with whatever it must not miss
  Clock::time_point spin_until{};
  std::vector<Watched> watched;  // the consumer's own

  // All below with the lock.
  void push(Entry entry);
  void wake();
  void expect_more();
  bool replaying() const;
  void take_requests();
  void wait_for_work(std::unique_lock<std::mutex>& lock);
  void spin(std::unique_lock<std::mutex>& lock);
  void run_first(std::unique_lock<std::mutex>& lock);

  // These take it.
  void begin_replay(Mailbox& mailbox) noexcept;
  void forget(const std::shared_ptr<Mailbox>& mailbox);
};

void TaskQueue::State::push(Entry entry) {
  tasks.push_back(std::move(entry));
  ++submitted;
  news.fetch_add(1, std::memory_order_release);
}

void TaskQueue::State::wake() {
  news.fetch_add(1, std::memory_order_release);
  work_arrived.notify_one();
}

void TaskQueue::State::expect_more() {
  if (spinning == Spinning::kAfterDevices) spin_until = Clock::now() + kBetweenLayersOfADevice;
}

bool TaskQueue::State::replaying() const {
  return std::any_of(mailboxes.begin(), mailboxes.end(), [](const auto& mailbox) { return mailbox->replaying; });
}

// Whoever submits or waits calls this first: what a stream asked for before comes before.
void TaskQueue::State::take_requests() {
  for (const std::shared_ptr<Mailbox>& mailbox : mailboxes) {
    if (!mailbox->replaying) continue;
    while (mailbox->has_request()) {
      const std::shared_ptr<Task>& task = mailbox->tasks[mailbox->taken++];
      push({[task] { (*task)(); }, Caller::kDeviceStream, mailbox, mailbox->taken});
    }
    mailbox->replaying = mailbox->taken < mailbox->tasks.size();
  }
}

void TaskQueue::State::begin_replay(Mailbox& mailbox) noexcept {
  std::unique_lock<std::mutex> lock(mutex);
  take_requests();
  task_finished.wait(lock, [&] { return mailbox.finished == mailbox.taken; });
  mailbox.taken = mailbox.finished = 0;
  mailbox.words->request.store(0);
  mailbox.words->done.store(0);
  mailbox.replaying = !mailbox.tasks.empty();
  expect_more();
  wake();
}

void TaskQueue::State::forget(const std::shared_ptr<Mailbox>& mailbox) {
  std::vector<std::shared_ptr<Task>> tasks_of_it;  // destroyed without the lock: they may own the queue
  {
    const std::lock_guard<std::mutex> lock(mutex);
    take_requests();
    tasks_of_it.swap(mailbox->tasks);
    mailbox->replaying = false;
    mailboxes.erase(std::remove(mailboxes.begin(), mailboxes.end(), mailbox), mailboxes.end());
    wake();
  }
}

TaskQueue::TaskQueue(Spinning spinning) : state_(std::make_shared<State>(spinning)) {}

TaskQueue::~TaskQueue() {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
    state_->wake();
  }
  if (!consumer_.joinable()) return;
  if (consumer_.get_id() == std::this_thread::get_id()) {
    consumer_.detach();
  } else {
    consumer_.join();
  }
}

void TaskQueue::start_consumer() {
  if (consumer_.joinable()) return;
  try {
    if (fails(Fault::kThreadStart)) throw std::system_error(EAGAIN, std::generic_category());
    consumer_ = std::thread([state = state_] { consume(state); });
  } catch (const std::system_error& error) {
    throw std::runtime_error(std::string("cannot start the thread of the task queue (") + error.what() +
                             "); allow more threads (ulimit -u, pids.max of the control group) or more memory");
  }
}

void TaskQueue::submit(Task task) { submit(std::move(task), Caller::kCpu); }

void TaskQueue::submit(Task task, Caller caller) {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    start_consumer();
    state_->take_requests();
    state_->push({std::move(task), caller, nullptr, 0});
  }
  state_->work_arrived.notify_one();
}

void TaskQueue::submit_from_stream(Task task) noexcept {
  try {
    submit(std::move(task), Caller::kDeviceStream);
  } catch (...) {
    std::lock_guard<std::mutex> lock(state_->mutex);
    if (!state_->error) state_->error = std::current_exception();
  }
}

void TaskQueue::wait(int allowed_pending) noexcept {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->take_requests();
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

std::shared_ptr<Mailbox> TaskQueue::mailbox(Mailbox::Owner owner) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  for (const std::shared_ptr<Mailbox>& mailbox : state_->mailboxes) {
    if (mailbox->owner == owner) return mailbox;
  }
  return nullptr;
}

TaskQueue::NewMailbox TaskQueue::make_mailbox(Mailbox::Owner owner) {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    start_consumer();  // a replay could not report that it fails
  }
  auto mailbox = std::make_shared<Mailbox>(owner);
  const std::shared_ptr<void> owned(nullptr, [state = state_, mailbox](void*) { state->forget(mailbox); });
  return {mailbox, [state = state_, mailbox, owned] { state->begin_replay(*mailbox); }};
}

void TaskQueue::attach(const std::shared_ptr<Mailbox>& mailbox) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->mailboxes.push_back(mailbox);
}

uint32_t TaskQueue::add(Mailbox& mailbox, std::vector<Task> tasks) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  for (Task& task : tasks) mailbox.tasks.push_back(std::make_shared<Task>(std::move(task)));
  return static_cast<uint32_t>(mailbox.tasks.size());
}

void TaskQueue::remove_last(Mailbox& mailbox, size_t count) {
  std::vector<std::shared_ptr<Task>> removed;
  std::lock_guard<std::mutex> lock(state_->mutex);
  removed.assign(mailbox.tasks.end() - count, mailbox.tasks.end());
  mailbox.tasks.resize(mailbox.tasks.size() - count);
}

void TaskQueue::State::spin(std::unique_lock<std::mutex>& lock) {
  const Clock::time_point until = spin_until;
  const uint32_t known = news.load(std::memory_order_relaxed);
  watched.clear();
  for (const std::shared_ptr<Mailbox>& mailbox : mailboxes) {
    if (mailbox->replaying) watched.push_back({mailbox->words, mailbox->taken});
  }
  const auto something_new = [&] {
    if (news.load(std::memory_order_acquire) != known) return true;
    return std::any_of(watched.begin(), watched.end(), [](const Watched& each) {
      return each.words->request.load(std::memory_order_acquire) > each.taken;
    });
  };
  lock.unlock();
  do {
    for (int i = 0; i < kPausesPerLook && !something_new(); ++i) __builtin_ia32_pause();
  } while (!something_new() && Clock::now() < until);
  lock.lock();
}

void TaskQueue::State::wait_for_work(std::unique_lock<std::mutex>& lock) {
  if (Clock::now() < spin_until) {
    spin(lock);
  } else if (replaying()) {
    work_arrived.wait_for(lock, kLookEvery);
  } else {
    work_arrived.wait(lock, [&] { return stopping || !tasks.empty() || replaying(); });
  }
}

void TaskQueue::State::run_first(std::unique_lock<std::mutex>& lock) {
  Entry entry = std::move(tasks.front());
  tasks.pop_front();
  lock.unlock();
  std::exception_ptr thrown;
  try {
    if (fails(Fault::kQueueTask)) throw std::runtime_error("a queued task was made to fail by KT_FAULT");
    entry.task();
  } catch (...) {
    thrown = std::current_exception();
  }
  entry.task = nullptr;  // what the task owns goes before anybody is told it has finished
  lock.lock();
  if (thrown && !error) error = thrown;
  ++finished;
  if (entry.mailbox != nullptr) {
    entry.mailbox->finished = entry.number;
    entry.mailbox->words->done.store(entry.number, std::memory_order_release);
  }
  if (entry.caller == Caller::kDeviceStream) expect_more();
  task_finished.notify_all();
}

void TaskQueue::consume(const std::shared_ptr<State>& state) {
  pthread_setname_np(pthread_self(), "kt-queue");
  std::unique_lock<std::mutex> lock(state->mutex);
  while (true) {
    state->take_requests();
    if (!state->tasks.empty()) {
      state->run_first(lock);
    } else if (state->stopping) {
      return;
    } else {
      state->wait_for_work(lock);
    }
  }
}

}  // namespace kt
