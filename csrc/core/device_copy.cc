#include "core/device_copy.h"

#include <stdexcept>

#include "core/device_runtime.h"

namespace kt {
namespace {

constexpr int kHostToDevice = 1;        // cudaMemcpyHostToDevice
constexpr int kNotReady = 600;          // cudaErrorNotReady, hipErrorNotReady
constexpr int kCaptureThreadLocal = 1;  // cudaStreamCaptureModeThreadLocal
// Without timing, and whoever waits sleeps: the cores are the compute threads'. Waking up takes tens of microseconds,
// which more than two buffers hide (doc/hybrid.md has the figures).
constexpr unsigned kEventFlags = 1 | 2;  // cudaEventBlockingSync | cudaEventDisableTiming

const DeviceRuntime& runtime() {
  const DeviceRuntime& r = require_device_runtime();
  if (!r.copies()) {
    throw std::runtime_error(
        "the device runtime of this process lacks functions for copies and events; "
        "use CUDA 11 or ROCm 5 or newer");
  }
  return r;
}

}  // namespace

StreamCopies::StreamCopies(int buffers) {
  const DeviceRuntime& r = runtime();
  check_device(r.get_device(&device_), "asking for the current device");
  for (std::vector<void*>* events : {&copied_, &used_}) {
    for (int b = 0; b < buffers; ++b) {
      events->push_back(nullptr);
      check_device(r.event_create(&events->back(), kEventFlags), "making an event");
    }
  }
}

StreamCopies::~StreamCopies() {
  const DeviceRuntime* r = device_runtime();
  for (const std::vector<void*>* events : {&copied_, &used_}) {
    for (void* event : *events) (void)r->event_destroy(event);  // at the process's end the runtime may be gone
  }
}

void StreamCopies::use_streams(StreamHandle bus, StreamHandle user) {
  bus_ = reinterpret_cast<void*>(bus);
  user_ = reinterpret_cast<void*>(user);
}

void StreamCopies::begin_thread() {
  check_device(runtime().set_device(device_), "choosing the device");
  // By default no thread may wait for an event while any other captures a graph.
  (void)exchange_capture_mode(kCaptureThreadLocal);
}

void StreamCopies::copy(void* to, const void* from, size_t bytes) {
  check_device(runtime().memcpy_async(to, from, bytes, kHostToDevice, bus_), "copying an expert to the device");
}

void StreamCopies::mark_copied(int buffer) {
  check_device(runtime().event_record(copied_[buffer], bus_), "recording an event");
}

bool StreamCopies::copied(int buffer) {
  const DeviceRuntime& r = runtime();
  const int status = r.event_query(copied_[buffer]);
  if (status == kNotReady) {
    forget_last_error(r);
    return false;
  }
  check_device(status, "copying an expert to the device");
  return true;
}

void StreamCopies::wait_until_copied(int buffer) {
  check_device(runtime().event_synchronize(copied_[buffer]), "copying an expert to the device");
}

void StreamCopies::let_user_wait(int buffer) {
  check_device(runtime().stream_wait_event(user_, copied_[buffer], 0), "waiting for an event");
}

void StreamCopies::mark_used(int buffer) {
  check_device(runtime().event_record(used_[buffer], user_), "recording an event");
}

void StreamCopies::wait_until_used(int buffer) {
  check_device(runtime().stream_wait_event(bus_, used_[buffer], 0), "waiting for an event");
}

}  // namespace kt
