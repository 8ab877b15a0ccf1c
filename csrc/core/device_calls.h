// CPU tasks enqueued on a device stream, and waits for them: through mailboxes where a capture records them and the
// device's memory operations work, through host functions otherwise.
//
// A plain call keeps its host functions: they wake the queue thread however late the stream gets there, and the program
// that enqueues kernel after kernel takes longer than they do. A replayed graph has nothing between its operations, so
// there the time that they take is the time a layer takes.
#pragma once

#include <memory>
#include <vector>

#include "core/device_stream.h"
#include "core/task_queue.h"

namespace kt {

// When `stream` gets there, `tasks` enter the queue one after the other, at every replay if captured. They must hold
// what owns the queue.
void submit_on_stream(TaskQueue& queue, StreamHandle stream, std::vector<TaskQueue::Task> tasks);

// The stream goes on when all but the last `allowed_pending` tasks of those that it has submitted have finished.
// `owner` is what owns the queue.
void sync_on_stream(TaskQueue& queue, StreamHandle stream, int allowed_pending, std::shared_ptr<void> owner);

}  // namespace kt
