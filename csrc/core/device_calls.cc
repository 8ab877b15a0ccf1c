#include "core/device_calls.h"

#include <mutex>
#include <utility>

#include "core/device_signals.h"
#include "core/mailbox.h"

namespace kt {
namespace {

using Task = TaskQueue::Task;

// Numbers are given and operations enqueued in the same order.
std::mutex& order_of_numbers() {
  static std::mutex mutex;
  return mutex;
}

// The mailbox for what is enqueued on `stream` now; null: use host functions.
std::shared_ptr<Mailbox> mailbox_of(TaskQueue& queue, StreamHandle stream) {
  // Asked at every call, so that plain calls before a capture have the operations tried outside of it.
  const bool usable = device_signals().kind == SignalKind::kMemoryOperations;
  const auto capture = capture_id(stream);
  if (!usable || !capture || *capture == 0) return nullptr;
  const Mailbox::Owner owner{*capture, stream};
  if (auto known = queue.mailbox(owner)) return known;
  TaskQueue::NewMailbox made = queue.make_mailbox(owner);
  launch_host_task(stream, std::move(made.begin_replay));
  queue.attach(made.mailbox);
  return made.mailbox;
}

uint32_t request(TaskQueue& queue, StreamHandle stream, Mailbox& mailbox, std::vector<Task> tasks) {
  const size_t count = tasks.size();
  const uint32_t last = queue.add(mailbox, std::move(tasks));
  try {
    enqueue_write(reinterpret_cast<void*>(stream), mailbox.words->request, last);
  } catch (...) {
    queue.remove_last(mailbox, count);
    throw;
  }
  return last;
}

}  // namespace

void submit_on_stream(TaskQueue& queue, StreamHandle stream, std::vector<Task> tasks) {
  const std::lock_guard<std::mutex> lock(order_of_numbers());
  if (const auto mailbox = mailbox_of(queue, stream)) {
    request(queue, stream, *mailbox, std::move(tasks));
    return;
  }
  launch_host_task(stream, [&queue, tasks = std::move(tasks)] {
    for (const Task& task : tasks) queue.submit_from_stream(task);
  });
}

void sync_on_stream(TaskQueue& queue, StreamHandle stream, int allowed_pending, std::shared_ptr<void> owner) {
  const std::lock_guard<std::mutex> lock(order_of_numbers());
  const auto mailbox = mailbox_of(queue, stream);
  if (mailbox == nullptr) {
    launch_host_task(stream, [&queue, owner = std::move(owner), allowed_pending] { queue.wait(allowed_pending); });
    return;
  }
  const auto enqueued = static_cast<int64_t>(mailbox->tasks.size());
  auto number = static_cast<uint32_t>(enqueued - allowed_pending);
  // Also for tasks from before the graph. Waits for more than it has to where the graph's own are few.
  if (enqueued <= allowed_pending) number = request(queue, stream, *mailbox, {[owner = std::move(owner)] {}});
  enqueue_wait(reinterpret_cast<void*>(stream), mailbox->words->done, number);
}

}  // namespace kt
