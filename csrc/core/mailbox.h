// Calls of a captured graph whose stream meets the CPU through memory operations (device_signals.h).
//
// A mailbox belongs to one queue and to one stream of one capture; the graph owns it and its tasks, numbered from 1 in
// the order in which they were enqueued. Both words only count up during a replay:
//
//   stream                                         queue thread
//   ------                                         ------------
//   host function: begin_replay            ->      both words 0, looks at the mailbox from now on
//   copies to the CPU
//   write request = 2                      ->      takes tasks 1 and 2 into the FIFO
//   (the device's own work)                        runs task 1, done = 1; runs task 2, done = 2
//   wait until done >= 1                   <-
//   copies from the CPU; the next layer: write request = 4, wait until done >= 3, ...
//
// Nothing is lost: a request that overwrites an earlier one, before the queue thread saw that, asks for its tasks too.
// Data is visible: the device's write comes after all it wrote before (a system-wide fence), and `done` is stored after
// the task's output; x86 keeps both in order.
//
// Only the first operation of each replay is a host function. It may run CPU code while the stream waits for it, and
// does what constants in a graph cannot: take what an earlier replay has asked for but nobody has seen, wait until that
// has finished, start the counts again, and wake the queue thread, which no memory operation can. Hence:
//
//   order            Everything that a stream does begins with a host function: a replay with the one above, a plain
//                    call as a whole. Each takes what is asked for in all mailboxes of its queue first, so that the
//                    tasks of one stream enter the FIFO in stream order, whatever graphs and plain calls they are of.
//   one replay       at a time uses a mailbox: launches of one executable graph are serialised by the runtime. Two
//                    executable graphs of one capture must not run at once; they would also write the same buffers.
//   deferral         sync may leave the last tasks: it waits for an earlier number. A sync that covers work from before
//                    the graph enqueues an empty task, which the FIFO puts behind that work.
//   errors           A task that throws counts as done; its error is kept by the queue as that of any other task.
//   the end          When the graph is destroyed, after its last launch has ended, no stream can touch the words any
//                    more. What it still has in the FIFO runs; then the words go to the next mailbox.
//   idle             With no replay under way the queue thread sleeps, however many mailboxes exist.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "core/device_signals.h"

namespace kt {

// The state of one; TaskQueue guards all but the words.
struct Mailbox {
  using Task = std::function<void()>;
  using Owner = std::pair<uint64_t, uintptr_t>;  // number of the capture, stream

  explicit Mailbox(Owner of) : owner(of) {}
  ~Mailbox() { release_signal_words(words); }
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  bool has_request() const { return words->request.load(std::memory_order_acquire) > taken; }

  const Owner owner;
  SignalWords* const words = acquire_signal_words();
  std::vector<std::shared_ptr<Task>> tasks;  // number n at n - 1
  uint32_t taken = 0;                        // of this replay
  uint32_t finished = 0;
  bool replaying = false;  // begun, and not yet asked for every task
};

}  // namespace kt
