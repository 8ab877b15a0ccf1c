#include "core/device_signals.h"

#include <chrono>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "core/device_runtime.h"
#include "core/device_stream.h"

namespace kt {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr const char* kVariable = "KT_KERNEL_DEVICE_SIGNALS";
constexpr unsigned kPortableMapped = 3;  // cudaHostAllocPortable | cudaHostAllocMapped: for every device
constexpr unsigned kNonBlocking = 1;     // cudaStreamNonBlocking: not ordered with the default stream
constexpr int kRelaxed = 2;              // cudaStreamCaptureModeRelaxed
constexpr unsigned kReaches = 0;         // CU_STREAM_WAIT_VALUE_GEQ, of the signed difference
constexpr uint32_t kWholeWord = ~0u;
constexpr size_t kPageBytes = 4096;

constexpr milliseconds kPatience{2000};  // a device busy with other work answers late, but it answers
constexpr milliseconds kPassesTooSoon{1};
constexpr std::chrono::microseconds kLookEvery{20};

// ---- words ----

struct WordPool {
  std::mutex mutex;
  std::vector<SignalWords*> free;
};

// Never destroyed: graphs may outlive everything else in the process.
WordPool& word_pool() {
  static auto* const pool = new WordPool;
  return *pool;
}

class RelaxedCapture {
 public:
  RelaxedCapture() : before_(exchange_capture_mode(kRelaxed)) {}
  ~RelaxedCapture() {
    try {
      exchange_capture_mode(before_);
    } catch (const std::runtime_error&) {  // the runtime gave us this mode itself
    }
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int before_;
};

void add_page(const DeviceRuntime& r, std::vector<SignalWords*>& words) {
  const RelaxedCapture relaxed;
  void* page = nullptr;
  check_device(r.host_alloc(&page, kPageBytes, kPortableMapped), "allocating page-locked memory");
  auto* const first = static_cast<SignalWords*>(page);
  for (size_t i = 0; i < kPageBytes / sizeof(SignalWords); ++i) words.push_back(new (first + i) SignalWords);
}

int write_status(const DeviceRuntime& r, void* stream, std::atomic<uint32_t>& word, uint32_t value) {
  if (r.write_value != nullptr) {
    return r.write_value(stream, reinterpret_cast<uintptr_t>(&word), value, 0);
  }
  return r.hip_write_value(stream, &word, value, 0);
}

int wait_status(const DeviceRuntime& r, void* stream, std::atomic<uint32_t>& word, uint32_t value) {
  if (r.wait_value != nullptr) return r.wait_value(stream, reinterpret_cast<uintptr_t>(&word), value, kReaches);
  return r.hip_wait_value(stream, &word, value, kReaches, kWholeWord);
}

// ---- the probe ----

std::string refused(const char* what, int status) {
  return std::string(what) + " failed with device error " + std::to_string(status);
}

bool reaches(const std::atomic<uint32_t>& word, uint32_t value) {
  const Clock::time_point deadline = Clock::now() + kPatience;
  while (word.load(std::memory_order_acquire) < value) {
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(kLookEvery);
  }
  return true;
}

// The stream says 1, waits for the CPU, says 2.
std::string enqueue_round(const DeviceRuntime& r, void* stream, SignalWords& words) {
  if (const int status = write_status(r, stream, words.request, 1)) return refused("writing in stream order", status);
  if (const int status = wait_status(r, stream, words.done, 1)) return refused("waiting in stream order", status);
  if (const int status = write_status(r, stream, words.request, 2)) return refused("writing in stream order", status);
  return {};
}

// `start` brings the device to begin a round. Returns what went wrong.
std::string play_round(SignalWords& words, const std::function<std::string()>& start) {
  words.request.store(0);
  words.done.store(0);
  std::string failure = start();
  if (!failure.empty()) return failure;
  const std::string limit = std::to_string(kPatience.count()) + " ms";
  if (!reaches(words.request, 1)) {
    failure = "what the device wrote did not arrive within " + limit;
  } else {
    std::this_thread::sleep_for(kPassesTooSoon);
    if (words.request.load() != 1) failure = "the device did not wait";
  }
  words.done.store(1, std::memory_order_release);  // in any case: a stream left waiting would block the device
  if (failure.empty() && !reaches(words.request, 2)) failure = "the device did not see a value within " + limit;
  return failure;
}

std::string captured_round(const DeviceRuntime& r, void* stream, SignalWords& words, void** executable) {
  void* graph = nullptr;
  if (const int status = r.stream_begin_capture(stream, kRelaxed)) return refused("capturing", status);
  std::string failure = enqueue_round(r, stream, words);
  const int ended = r.stream_end_capture(stream, &graph);
  if (failure.empty() && ended != 0) failure = refused("ending a capture", ended);
  if (failure.empty()) {
    const int made = r.graph_instantiate(executable, graph, 0);
    if (made != 0) failure = refused("making a graph", made);
  }
  if (graph != nullptr) (void)r.graph_destroy(graph);
  return failure;
}

std::string probe_on(const DeviceRuntime& r, void* stream, SignalWords& words) {
  std::string failure = play_round(words, [&] { return enqueue_round(r, stream, words); });
  if (!failure.empty()) return failure;
  void* executable = nullptr;
  failure = captured_round(r, stream, words, &executable);
  const auto launch = [&]() -> std::string {
    const int status = r.graph_launch(executable, stream);
    return status == 0 ? "" : refused("launching", status);
  };
  for (int replay = 0; replay < 2 && failure.empty(); ++replay) failure = play_round(words, launch);
  if (!failure.empty()) return "in a graph, " + failure;
  (void)r.graph_exec_destroy(executable);
  return {};
}

// Returns why memory operations cannot be used; nothing if they work. A failed try gives nothing back: the device may
// still come to it.
std::string probe(const DeviceRuntime& r) {
  if (!r.memory_operations()) return "the driver has no stream memory operations";
  if (!r.graphs_own_objects() || !r.captures_own_graphs() || r.host_alloc == nullptr ||
      r.host_get_device_pointer == nullptr) {
    return "the device runtime is too old";
  }
  const RelaxedCapture relaxed;
  SignalWords* const words = acquire_signal_words();
  void* on_device = nullptr;
  if (r.host_get_device_pointer(&on_device, words, 0) != 0 || on_device != words) {
    return "page-locked memory has another address on the device";
  }
  void* stream = nullptr;
  if (const int status = r.stream_create(&stream, kNonBlocking)) return refused("making a stream", status);
  const std::string failure = probe_on(r, stream, *words);
  if (!failure.empty()) return failure;
  (void)r.stream_destroy(stream);
  release_signal_words(words);
  return {};
}

DeviceSignals choose(const DeviceRuntime& r) {
  if (const char* wish = std::getenv(kVariable)) {
    if (std::string_view(wish) != "host-functions") {
      throw std::invalid_argument(std::string(kVariable) + " is '" + wish +
                                  "'; the one value it may have is 'host-functions'");
    }
    return {SignalKind::kHostFunctions, std::string("the variable ") + kVariable + " asks for them"};
  }
  const std::string failure = probe(r);
  if (failure.empty()) {
    return {SignalKind::kMemoryOperations, "they worked when tried, enqueued and in a graph"};
  }
  forget_last_error(r);
  return {SignalKind::kHostFunctions, "stream memory operations do not work: " + failure};
}

}  // namespace

const DeviceSignals& device_signals() {
  static std::mutex mutex;
  static auto* const of_device = new std::map<int, DeviceSignals>;
  const DeviceRuntime& r = require_device_runtime();
  int device = 0;
  if (r.get_device != nullptr) check_device(r.get_device(&device), "asking for the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = of_device->find(device);
  return known != of_device->end() ? known->second : of_device->emplace(device, choose(r)).first->second;
}

SignalWords* acquire_signal_words() {
  WordPool& pool = word_pool();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  if (pool.free.empty()) add_page(require_device_runtime(), pool.free);
  SignalWords* const words = pool.free.back();
  pool.free.pop_back();
  words->request.store(0);
  words->done.store(0);
  return words;
}

void release_signal_words(SignalWords* words) {
  const std::lock_guard<std::mutex> lock(word_pool().mutex);
  word_pool().free.push_back(words);
}

void enqueue_write(void* stream, std::atomic<uint32_t>& word, uint32_t value) {
  check_device(write_status(require_device_runtime(), stream, word, value), "enqueueing a write");
}

void enqueue_wait(void* stream, std::atomic<uint32_t>& word, uint32_t value) {
  check_device(wait_status(require_device_runtime(), stream, word, value), "enqueueing a wait");
}

}  // namespace kt
