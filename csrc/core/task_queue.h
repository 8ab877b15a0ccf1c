// FIFO of CPU tasks with one consumer thread, started at the first submit. A task that throws does not stop the
// queue: the first error is kept and thrown by the next `sync` (or `raise_pending_error`), once.
//
// Tasks also come from mailboxes (mailbox.h): the consumer looks at those of graphs that are being replayed. It sleeps
// when there is nothing to do, but after tasks of a device stream it spins first, because the next layer's will follow
// (caller.h).
#pragma once

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "core/caller.h"
#include "core/mailbox.h"

namespace kt {

enum class Spinning { kNever, kAfterDevices };

class TaskQueue {
 public:
  using Task = std::function<void()>;

  explicit TaskQueue(Spinning spinning);
  ~TaskQueue();  // finishes what was submitted
  TaskQueue(const TaskQueue&) = delete;
  TaskQueue& operator=(const TaskQueue&) = delete;

  void submit(Task task);
  // From a host function, which cannot throw: a failure is kept like an error of the task.
  void submit_from_stream(Task task) noexcept;
  // Blocks until all but the last `allowed_pending` of the tasks submitted so far have finished, then throws a kept
  // error if there is one. Tasks that others submit meanwhile are not waited for.
  void sync(int allowed_pending = 0);
  // The same without throwing: what a host function may call.
  void wait(int allowed_pending) noexcept;
  void raise_pending_error();
  int pending() const;

  // ---- mailboxes ----

  // Null if there is none of this owner.
  std::shared_ptr<Mailbox> mailbox(Mailbox::Owner owner) const;
  // `begin_replay` must be the first thing that each replay does, and owns the mailbox: when it is destroyed, the
  // mailbox's tasks are forgotten.
  struct NewMailbox {
    std::shared_ptr<Mailbox> mailbox;
    Task begin_replay;
  };
  NewMailbox make_mailbox(Mailbox::Owner owner);
  // From now on `mailbox(owner)` finds it.
  void attach(const std::shared_ptr<Mailbox>& mailbox);
  // Returns the number of the last task of the mailbox.
  uint32_t add(Mailbox& mailbox, std::vector<Task> tasks);
  void remove_last(Mailbox& mailbox, size_t count);

 private:
  struct State;
  void submit(Task task, Caller caller);
  static void consume(const std::shared_ptr<State>& state);
  void start_consumer();  // with the lock

  // Shared with the consumer: a task may own the last reference to the owner of this queue, and then the queue is
  // destroyed by its own consumer thread.
  std::shared_ptr<State> state_;
  std::thread consumer_;
};

}  // namespace kt
