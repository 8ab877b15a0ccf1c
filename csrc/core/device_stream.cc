#include "core/device_stream.h"

#include <dlfcn.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/release_later.h"

namespace kt {
namespace {

using HostFunction = void (*)(void*);
using Task = std::function<void()>;

constexpr int kCapturing = 1;              // cudaStreamCaptureStatusActive
constexpr unsigned kNoDestructorSync = 1;  // cudaUserObjectNoDestructorSync: nobody can wait for the destructor
constexpr unsigned kMove = 1;              // cudaGraphUserObjectMove: the graph takes our reference
constexpr int kCuda13 = 13000;

// The CUDA runtime and HIP give these functions the same shape; enums travel as int in both ABIs. What stands after
// `stream_is_capturing` may be missing.
struct Runtime {
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

  bool complete() const { return launch_host_func != nullptr && stream_is_capturing != nullptr; }
  bool graphs_own_objects() const { return user_object_create != nullptr && graph_retain_user_object != nullptr; }
};

Runtime lookup(void* library, const std::string& prefix) {
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, (prefix + name).c_str()));
  };
  Runtime runtime;
  find(runtime.launch_host_func, "LaunchHostFunc");
  find(runtime.stream_is_capturing, "StreamIsCapturing");
  find(runtime.user_object_create, "UserObjectCreate");
  find(runtime.graph_retain_user_object, "GraphRetainUserObject");
  find(runtime.exchange_capture_mode, "ThreadExchangeStreamCaptureMode");
  find(runtime.capture_info, "StreamGetCaptureInfo_v2");

  // CUDA 12 has the name without a suffix too, for a function with fewer arguments: only the version tells.
  int (*version_of)(int* version) = nullptr;
  int version = 0;
  find(version_of, "RuntimeGetVersion");
  const bool known = version_of != nullptr && version_of(&version) == 0;
  if (prefix == "cuda" && known && version >= kCuda13) find(runtime.capture_info_13, "StreamGetCaptureInfo");
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

struct Capture {
  unsigned long long id = 0;
  void* graph = nullptr;  // null: the runtime does not say
};

std::optional<Capture> capture_of(const Runtime& r, void* stream) {
  int status = 0;
  check(r.stream_is_capturing(stream, &status), "asking a stream for capture");
  if (status != kCapturing) return std::nullopt;
  Capture capture;
  int failed = 1;
  if (r.capture_info_13 != nullptr) {
    failed = r.capture_info_13(stream, &status, &capture.id, &capture.graph, nullptr, nullptr, nullptr);
  } else if (r.capture_info != nullptr) {
    failed = r.capture_info(stream, &status, &capture.id, &capture.graph, nullptr, nullptr);
  }
  return failed != 0 ? Capture{} : capture;
}

void run_once(void* context) {
  const std::unique_ptr<Task> task(static_cast<Task*>(context));
  (*task)();
}

void run_kept(void* context) { (*static_cast<Task*>(context))(); }

// On a thread of the device runtime, when no graph needs the task any more.
void give_up(void* context) { release_later(std::shared_ptr<Task>(static_cast<Task*>(context))); }

// Makes the graph the owner of `task`; otherwise nobody owns it and it stays for the life of the process.
void* owned_by_graph(const Runtime& r, void* graph, std::unique_ptr<Task> task) {
  Task* const raw = task.release();
  void* object = nullptr;
  if (graph == nullptr || !r.graphs_own_objects()) return raw;
  if (r.user_object_create(&object, raw, give_up, 1, kNoDestructorSync) != 0) return raw;
  // If this fails the reference stays ours and is never given back.
  (void)r.graph_retain_user_object(graph, object, 1, kMove);
  return raw;
}

}  // namespace

bool device_runtime_present() { return runtime() != nullptr; }

std::optional<uint64_t> capture_id(StreamHandle stream) {
  const auto capture = capture_of(require_runtime(), reinterpret_cast<void*>(stream));
  if (!capture) return std::nullopt;
  return capture->id;
}

void launch_host_task(StreamHandle stream, std::function<void()> task) {
  const Runtime& r = require_runtime();
  void* const handle = reinterpret_cast<void*>(stream);
  const auto capture = capture_of(r, handle);
  auto owned = std::make_unique<Task>(std::move(task));
  if (capture) {
    void* const kept = owned_by_graph(r, capture->graph, std::move(owned));
    check(r.launch_host_func(handle, run_kept, kept), "enqueueing a host function");
  } else {
    check(r.launch_host_func(handle, run_once, owned.get()), "enqueueing a host function");
    (void)owned.release();  // run_once owns it
  }
}

int exchange_capture_mode(int mode) {
  const Runtime& r = require_runtime();
  if (r.exchange_capture_mode != nullptr) check(r.exchange_capture_mode(&mode), "exchanging the capture mode");
  return mode;
}

}  // namespace kt
