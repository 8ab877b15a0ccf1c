// Host functions on a CUDA or HIP stream without linking either: the entry points are looked up in the runtime library
// that the process (torch) has already loaded. Without such a library every call throws std::runtime_error.
#pragma once

#include <cstdint>
#include <functional>

namespace kt {

using StreamHandle = uintptr_t;  // cudaStream_t / hipStream_t as an integer

bool device_runtime_present();

// True while `stream` records into a graph; host functions enqueued then run at every replay.
bool stream_is_capturing(StreamHandle stream);

// Enqueues `function(context)`, to run when the stream gets there.
void launch_host_function(StreamHandle stream, void (*function)(void*), void* context);

// Enqueues `task` and owns it: freed after it ran, or kept for the life of the process when the stream is capturing,
// because a graph may replay it at any time. `task` must not throw and must not call the device runtime.
void launch_host_task(StreamHandle stream, std::function<void()> task);

}  // namespace kt
