#include "core/device_stream.h"

#include <dlfcn.h>

#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace kt {
namespace {

using HostFunction = void (*)(void*);

// The CUDA runtime and HIP give these two functions the same shape; enums travel as int in both ABIs.
struct Runtime {
  int (*launch_host_func)(void* stream, HostFunction function, void* context) = nullptr;
  int (*stream_is_capturing)(void* stream, int* status) = nullptr;
  bool complete() const { return launch_host_func != nullptr && stream_is_capturing != nullptr; }
};

Runtime lookup(void* library, const std::string& prefix) {
  Runtime runtime;
  runtime.launch_host_func =
      reinterpret_cast<decltype(runtime.launch_host_func)>(dlsym(library, (prefix + "LaunchHostFunc").c_str()));
  runtime.stream_is_capturing =
      reinterpret_cast<decltype(runtime.stream_is_capturing)>(dlsym(library, (prefix + "StreamIsCapturing").c_str()));
  return runtime;
}

Runtime find_runtime() {
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
    const Runtime runtime = lookup(library, c.prefix);
    if (runtime.complete()) return runtime;
  }
  return {};
}

// Looked up again until found: torch may be imported after us.
const Runtime* runtime() {
  static std::mutex mutex;
  static Runtime found;
  std::lock_guard<std::mutex> lock(mutex);
  if (!found.complete()) found = find_runtime();
  return found.complete() ? &found : nullptr;
}

const Runtime& require_runtime() {
  const Runtime* r = runtime();
  if (r == nullptr) {
    throw std::runtime_error(
        "no CUDA or HIP runtime is loaded in this process, so there is no device stream to run on; "
        "pass CPU tensors, or import a torch built for your accelerator");
  }
  return *r;
}

void check(int status, const char* what) {
  if (status != 0) {
    throw std::runtime_error(std::string(what) + " failed with device runtime error " + std::to_string(status));
  }
}

void run_once(void* context) {
  auto* task = static_cast<std::function<void()>*>(context);
  (*task)();
  delete task;
}

void run_kept(void* context) { (*static_cast<std::function<void()>*>(context))(); }

}  // namespace

bool device_runtime_present() { return runtime() != nullptr; }

bool stream_is_capturing(StreamHandle stream) {
  int status = 0;
  check(require_runtime().stream_is_capturing(reinterpret_cast<void*>(stream), &status), "asking a stream for capture");
  return status == 1;  // cudaStreamCaptureStatusActive
}

void launch_host_function(StreamHandle stream, void (*function)(void*), void* context) {
  check(require_runtime().launch_host_func(reinterpret_cast<void*>(stream), function, context),
        "enqueueing a host function");
}

void launch_host_task(StreamHandle stream, std::function<void()> task) {
  if (stream_is_capturing(stream)) {
    static std::mutex mutex;
    static std::deque<std::function<void()>> kept;  // deque: addresses stay valid
    std::function<void()>* slot;
    {
      std::lock_guard<std::mutex> lock(mutex);
      kept.push_back(std::move(task));
      slot = &kept.back();
    }
    launch_host_function(stream, run_kept, slot);
    return;
  }
  auto* owned = new std::function<void()>(std::move(task));
  try {
    launch_host_function(stream, run_once, owned);
  } catch (...) {
    delete owned;
    throw;
  }
}

}  // namespace kt
