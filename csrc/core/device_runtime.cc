#include "core/device_runtime.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

constexpr int kCuda13 = 13000;

template <class Function>
void find_in(void* library, Function& function, const std::string& name) {
  function = reinterpret_cast<Function>(dlsym(library, name.c_str()));
}

// The operations of the driver, which the process has if it has the runtime; HIP has them in its runtime. (Those
// without _v2 in CUDA's are older functions that work where an option of the kernel module allows them.)
void find_memory_operations(DeviceRuntime& runtime, void* library, const std::string& prefix) {
  if (prefix == "hip") {
    find_in(library, runtime.hip_write_value, "hipStreamWriteValue32");
    find_in(library, runtime.hip_wait_value, "hipStreamWaitValue32");
    return;
  }
  void* const loaded = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  void* const driver = loaded != nullptr ? loaded : RTLD_DEFAULT;
  find_in(driver, runtime.write_value, "cuStreamWriteValue32_v2");
  find_in(driver, runtime.wait_value, "cuStreamWaitValue32_v2");
}

DeviceRuntime lookup(void* library, const std::string& prefix) {
  const auto find = [&](auto& function, const char* name) { find_in(library, function, prefix + name); };
  DeviceRuntime runtime;
  find(runtime.launch_host_func, "LaunchHostFunc");
  find(runtime.stream_is_capturing, "StreamIsCapturing");
  find(runtime.user_object_create, "UserObjectCreate");
  find(runtime.graph_retain_user_object, "GraphRetainUserObject");
  find(runtime.exchange_capture_mode, "ThreadExchangeStreamCaptureMode");
  find(runtime.host_register, "HostRegister");
  find(runtime.capture_info, "StreamGetCaptureInfo_v2");

  find(runtime.memcpy_async, "MemcpyAsync");
  find(runtime.event_create, "EventCreateWithFlags");
  find(runtime.event_destroy, "EventDestroy");
  find(runtime.event_record, "EventRecord");
  find(runtime.event_query, "EventQuery");
  find(runtime.event_synchronize, "EventSynchronize");
  find(runtime.stream_wait_event, "StreamWaitEvent");
  find(runtime.get_device, "GetDevice");
  find(runtime.set_device, "SetDevice");
  find(runtime.get_last_error, "GetLastError");

  find(runtime.host_alloc, prefix == "hip" ? "HostMalloc" : "HostAlloc");
  find(runtime.host_get_device_pointer, "HostGetDevicePointer");
  find(runtime.stream_create, "StreamCreateWithFlags");
  find(runtime.stream_destroy, "StreamDestroy");
  find(runtime.stream_begin_capture, "StreamBeginCapture");
  find(runtime.stream_end_capture, "StreamEndCapture");
  find(runtime.graph_instantiate, "GraphInstantiateWithFlags");
  find(runtime.graph_launch, "GraphLaunch");
  find(runtime.graph_destroy, "GraphDestroy");
  find(runtime.graph_exec_destroy, "GraphExecDestroy");
  find_memory_operations(runtime, library, prefix);

  // CUDA 12 has the name without a suffix too, for a function with fewer arguments: only the version tells.
  int (*version_of)(int* version) = nullptr;
  int version = 0;
  find(version_of, "RuntimeGetVersion");
  const bool known = version_of != nullptr && version_of(&version) == 0;
  if (prefix == "cuda" && known && version >= kCuda13) find(runtime.capture_info_13, "StreamGetCaptureInfo");
  return runtime;
}

DeviceRuntime find_runtime() {
  struct Candidate {
    const char* library;  // nullptr = whatever the process exports globally
    const char* prefix;
  };
  constexpr Candidate kCandidates[] = {
      {nullptr, "cuda"}, {"libcudart.so.13", "cuda"}, {"libcudart.so.12", "cuda"}, {"libcudart.so.11.0", "cuda"},
      {nullptr, "hip"},  {"libamdhip64.so", "hip"},
  };
  for (const Candidate& c : kCandidates) {
    // RTLD_NOLOAD: only a library that torch uses is of use; loading a second runtime would have other streams.
    void* library = c.library == nullptr ? RTLD_DEFAULT : dlopen(c.library, RTLD_LAZY | RTLD_NOLOAD);
    if (c.library != nullptr && library == nullptr) continue;
    const DeviceRuntime runtime = lookup(library, c.prefix);
    if (runtime.complete()) return runtime;
  }
  return {};
}

}  // namespace

// Looked up again until found: torch may be imported after us.
const DeviceRuntime* device_runtime() {
  static std::mutex mutex;
  static DeviceRuntime found;
  std::lock_guard<std::mutex> lock(mutex);
  if (!found.complete()) found = find_runtime();
  return found.complete() ? &found : nullptr;
}

const DeviceRuntime& require_device_runtime() {
  const DeviceRuntime* r = device_runtime();
  if (r == nullptr) {
    throw std::runtime_error(
        "no CUDA or HIP runtime is loaded in this process, so there is no device stream to run on; "
        "pass CPU tensors, or import a torch built for your accelerator");
  }
  return *r;
}

void forget_last_error(const DeviceRuntime& runtime) {
  if (runtime.get_last_error != nullptr) (void)runtime.get_last_error();
}

void check_device(int status, const char* what) {
  if (status != 0) {
    if (const DeviceRuntime* runtime = device_runtime()) forget_last_error(*runtime);
    throw std::runtime_error(std::string(what) + " failed with device runtime error " + std::to_string(status));
  }
}

}  // namespace kt
