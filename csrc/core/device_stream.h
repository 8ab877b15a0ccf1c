// Host functions on a CUDA or HIP stream without linking either: the entry points are looked up in the runtime library
// that the process (torch) has already loaded. Without such a library every call throws std::runtime_error.
//
//   a stream that runs      task -> runs once when the stream gets there -> destroyed on the runtime's thread
//   a stream that captures  task -> owned by the graph, runs at every replay -> release_later when graph and
//                           executable graphs are destroyed and their last launch has ended
//
// A graph owns its tasks as user objects (CUDA 11.3, ROCm 5.3). A runtime without them keeps captured tasks for the
// life of the process, because a graph may replay them at any time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>

namespace kt {

using StreamHandle = uintptr_t;  // cudaStream_t / hipStream_t as an integer

bool device_runtime_present();

// The number of the capture that `stream` records, unique in the process; 0 from a runtime that does not number them;
// nothing when the stream does not capture. Host functions enqueued during a capture run at every replay.
std::optional<uint64_t> capture_id(StreamHandle stream);

// Enqueues `task` and owns it, see above. `task` must not throw and must not call the device runtime.
void launch_host_task(StreamHandle stream, std::function<void()> task);

// What this thread may do while a stream captures: cudaStreamCaptureMode (0 global, 1 thread-local, 2 relaxed). Returns
// the mode before; `mode` where the runtime has no such thing.
int exchange_capture_mode(int mode);

// Page-locks memory that exists. Returns the runtime's status: memory that cannot be page-locked stays of use.
int page_lock(void* memory, size_t bytes);

}  // namespace kt
