#include "core/device_stream.h"

#include <memory>
#include <utility>

#include "core/device_runtime.h"
#include "core/release_later.h"

namespace kt {
namespace {

using Task = std::function<void()>;

constexpr int kCapturing = 1;              // cudaStreamCaptureStatusActive
constexpr unsigned kNoDestructorSync = 1;  // cudaUserObjectNoDestructorSync: nobody can wait for the destructor
constexpr int kNotSupported = 801;         // cudaErrorNotSupported
constexpr unsigned kMove = 1;              // cudaGraphUserObjectMove: the graph takes our reference

struct Capture {
  unsigned long long id = 0;
  void* graph = nullptr;  // null: the runtime does not say
};

std::optional<Capture> capture_of(const DeviceRuntime& r, void* stream) {
  int status = 0;
  check_device(r.stream_is_capturing(stream, &status), "asking a stream for capture");
  if (status != kCapturing) return std::nullopt;
  Capture capture;
  int failed = 1;
  if (r.capture_info_13 != nullptr) {
    failed = r.capture_info_13(stream, &status, &capture.id, &capture.graph, nullptr, nullptr, nullptr);
  } else if (r.capture_info != nullptr) {
    failed = r.capture_info(stream, &status, &capture.id, &capture.graph, nullptr, nullptr);
  }
  if (failed == 0) return capture;
  forget_last_error(r);
  return Capture{};
}

void run_once(void* context) {
  const std::unique_ptr<Task> task(static_cast<Task*>(context));
  (*task)();
}

void run_kept(void* context) { (*static_cast<Task*>(context))(); }

// On a thread of the device runtime, when no graph needs the task any more.
void give_up(void* context) { release_later(std::shared_ptr<Task>(static_cast<Task*>(context))); }

// Makes the graph the owner of `task`; otherwise nobody owns it and it stays for the life of the process.
void* owned_by_graph(const DeviceRuntime& r, void* graph, std::unique_ptr<Task> task) {
  Task* const raw = task.release();
  void* object = nullptr;
  if (graph == nullptr || !r.graphs_own_objects()) return raw;
  // If either fails the reference stays ours and is never given back.
  if (r.user_object_create(&object, raw, give_up, 1, kNoDestructorSync) != 0 ||
      r.graph_retain_user_object(graph, object, 1, kMove) != 0) {
    forget_last_error(r);
  }
  return raw;
}

}  // namespace

bool device_runtime_present() { return device_runtime() != nullptr; }

std::optional<uint64_t> capture_id(StreamHandle stream) {
  const auto capture = capture_of(require_device_runtime(), reinterpret_cast<void*>(stream));
  if (!capture) return std::nullopt;
  return capture->id;
}

void launch_host_task(StreamHandle stream, std::function<void()> task) {
  const DeviceRuntime& r = require_device_runtime();
  void* const handle = reinterpret_cast<void*>(stream);
  const auto capture = capture_of(r, handle);
  auto owned = std::make_unique<Task>(std::move(task));
  if (capture) {
    void* const kept = owned_by_graph(r, capture->graph, std::move(owned));
    check_device(r.launch_host_func(handle, run_kept, kept), "enqueueing a host function");
  } else {
    check_device(r.launch_host_func(handle, run_once, owned.get()), "enqueueing a host function");
    (void)owned.release();  // run_once owns it
  }
}

int exchange_capture_mode(int mode) {
  const DeviceRuntime& r = require_device_runtime();
  if (r.exchange_capture_mode != nullptr) check_device(r.exchange_capture_mode(&mode), "exchanging the capture mode");
  return mode;
}

int page_lock(void* memory, size_t bytes) {
  const DeviceRuntime& r = require_device_runtime();
  if (r.host_register == nullptr) return kNotSupported;
  const int status = r.host_register(memory, bytes, 0);
  if (status != 0) forget_last_error(r);
  return status;
}

}  // namespace kt
