// The entry points of the CUDA or HIP runtime that the process (torch) has already loaded, looked up by name: this
// extension links neither.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

using HostFunction = void (*)(void*);

// The CUDA runtime and HIP give these functions the same shape; enums travel as int in both ABIs. What stands after
// `stream_is_capturing` may be missing.
struct DeviceRuntime {
  int (*launch_host_func)(void* stream, HostFunction function, void* context) = nullptr;
  int (*stream_is_capturing)(void* stream, int* status) = nullptr;

  int (*capture_info)(void* stream, int* status, unsigned long long* id, void** graph, void*, void*) = nullptr;
  // CUDA 13: one argument more, and the old name.
  int (*capture_info_13)(void* stream, int* status, unsigned long long* id, void** graph, void*, void*,
                         void*) = nullptr;
  int (*user_object_create)(void** object, void* context, HostFunction destroy, unsigned references,
                            unsigned flags) = nullptr;
  int (*graph_retain_user_object)(void* graph, void* object, unsigned count, unsigned flags) = nullptr;
  int (*exchange_capture_mode)(int* mode) = nullptr;

  int (*memcpy_async)(void* to, const void* from, size_t bytes, int kind, void* stream) = nullptr;
  int (*event_create)(void** event, unsigned flags) = nullptr;
  int (*event_destroy)(void* event) = nullptr;
  int (*event_record)(void* event, void* stream) = nullptr;
  int (*event_query)(void* event) = nullptr;
  int (*event_synchronize)(void* event) = nullptr;
  int (*stream_wait_event)(void* stream, void* event, unsigned flags) = nullptr;
  int (*get_device)(int* number) = nullptr;
  int (*set_device)(int number) = nullptr;
  int (*get_last_error)() = nullptr;
  int (*host_register)(void* memory, size_t bytes, unsigned flags) = nullptr;

  int (*host_alloc)(void** memory, size_t bytes, unsigned flags) = nullptr;
  int (*host_get_device_pointer)(void** on_device, void* memory, unsigned flags) = nullptr;
  int (*stream_create)(void** stream, unsigned flags) = nullptr;
  int (*stream_destroy)(void* stream) = nullptr;
  int (*stream_begin_capture)(void* stream, int mode) = nullptr;
  int (*stream_end_capture)(void* stream, void** graph) = nullptr;
  int (*graph_instantiate)(void** executable, void* graph, unsigned long long flags) = nullptr;
  int (*graph_launch)(void* executable, void* stream) = nullptr;
  int (*graph_destroy)(void* graph) = nullptr;
  int (*graph_exec_destroy)(void* executable) = nullptr;

  // Of CUDA's driver (cuStreamWriteValue32_v2, cuStreamWaitValue32_v2), or HIP's own.
  int (*write_value)(void* stream, unsigned long long address, uint32_t value, unsigned flags) = nullptr;
  int (*wait_value)(void* stream, unsigned long long address, uint32_t value, unsigned flags) = nullptr;
  int (*hip_write_value)(void* stream, void* address, uint32_t value, unsigned flags) = nullptr;
  int (*hip_wait_value)(void* stream, void* address, uint32_t value, unsigned flags, uint32_t mask) = nullptr;

  bool complete() const { return launch_host_func != nullptr && stream_is_capturing != nullptr; }
  bool graphs_own_objects() const { return user_object_create != nullptr && graph_retain_user_object != nullptr; }
  bool memory_operations() const {
    return (write_value != nullptr && wait_value != nullptr) ||
           (hip_write_value != nullptr && hip_wait_value != nullptr);
  }
  bool captures_own_graphs() const {
    return stream_create != nullptr && stream_destroy != nullptr && stream_begin_capture != nullptr &&
           stream_end_capture != nullptr && graph_instantiate != nullptr && graph_launch != nullptr &&
           graph_destroy != nullptr && graph_exec_destroy != nullptr;
  }
  bool copies() const {
    return memcpy_async != nullptr && event_create != nullptr && event_destroy != nullptr && event_record != nullptr &&
           event_query != nullptr && event_synchronize != nullptr && stream_wait_event != nullptr &&
           get_device != nullptr && set_device != nullptr && get_last_error != nullptr;
  }
};

// Where a function has this name and type. Before CUDA 13 means HIP too.
enum class FoundIn { kEvery, kBeforeCuda13, kCuda13, kCuda, kCudaDriver, kHip };

// Visits every member with the function's name after its prefix (cuda, hip; cu in the driver): the one list by which
// members are looked up, and by which tests compare them with the vendors' headers.
template <class Runtime, class Visit>
void for_each_entry_point(Runtime& runtime, const Visit& visit) {
  visit(runtime.launch_host_func, "LaunchHostFunc", FoundIn::kEvery);
  visit(runtime.stream_is_capturing, "StreamIsCapturing", FoundIn::kEvery);
  visit(runtime.capture_info, "StreamGetCaptureInfo_v2", FoundIn::kBeforeCuda13);
  visit(runtime.capture_info_13, "StreamGetCaptureInfo", FoundIn::kCuda13);
  visit(runtime.user_object_create, "UserObjectCreate", FoundIn::kEvery);
  visit(runtime.graph_retain_user_object, "GraphRetainUserObject", FoundIn::kEvery);
  visit(runtime.exchange_capture_mode, "ThreadExchangeStreamCaptureMode", FoundIn::kEvery);

  visit(runtime.memcpy_async, "MemcpyAsync", FoundIn::kEvery);
  visit(runtime.event_create, "EventCreateWithFlags", FoundIn::kEvery);
  visit(runtime.event_destroy, "EventDestroy", FoundIn::kEvery);
  visit(runtime.event_record, "EventRecord", FoundIn::kEvery);
  visit(runtime.event_query, "EventQuery", FoundIn::kEvery);
  visit(runtime.event_synchronize, "EventSynchronize", FoundIn::kEvery);
  visit(runtime.stream_wait_event, "StreamWaitEvent", FoundIn::kEvery);
  visit(runtime.get_device, "GetDevice", FoundIn::kEvery);
  visit(runtime.set_device, "SetDevice", FoundIn::kEvery);
  visit(runtime.get_last_error, "GetLastError", FoundIn::kEvery);
  visit(runtime.host_register, "HostRegister", FoundIn::kEvery);

  visit(runtime.host_alloc, "HostAlloc", FoundIn::kCuda);
  visit(runtime.host_alloc, "HostMalloc", FoundIn::kHip);
  visit(runtime.host_get_device_pointer, "HostGetDevicePointer", FoundIn::kEvery);
  visit(runtime.stream_create, "StreamCreateWithFlags", FoundIn::kEvery);
  visit(runtime.stream_destroy, "StreamDestroy", FoundIn::kEvery);
  visit(runtime.stream_begin_capture, "StreamBeginCapture", FoundIn::kEvery);
  visit(runtime.stream_end_capture, "StreamEndCapture", FoundIn::kEvery);
  visit(runtime.graph_instantiate, "GraphInstantiateWithFlags", FoundIn::kEvery);
  visit(runtime.graph_launch, "GraphLaunch", FoundIn::kEvery);
  visit(runtime.graph_destroy, "GraphDestroy", FoundIn::kEvery);
  visit(runtime.graph_exec_destroy, "GraphExecDestroy", FoundIn::kEvery);

  // The older functions, without _v2, work only where an option of the kernel module allows them.
  visit(runtime.write_value, "StreamWriteValue32_v2", FoundIn::kCudaDriver);
  visit(runtime.wait_value, "StreamWaitValue32_v2", FoundIn::kCudaDriver);
  visit(runtime.hip_write_value, "StreamWriteValue32", FoundIn::kHip);
  visit(runtime.hip_wait_value, "StreamWaitValue32", FoundIn::kHip);
}

// The runtime of this process, null while none is loaded.
const DeviceRuntime* device_runtime();

// The same; throws std::runtime_error with a sentence where there is none.
const DeviceRuntime& require_device_runtime();

// After a call that failed: the runtime remembers its error for this thread, and whoever next checks a kernel launch
// would raise it. (An error that leaves the device unusable stays.)
void forget_last_error(const DeviceRuntime& runtime);

// Throws std::runtime_error naming `what` and the status unless that is 0; the runtime forgets the error.
void check_device(int status, const char* what);

}  // namespace kt
