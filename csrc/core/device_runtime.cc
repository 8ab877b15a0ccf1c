#include "core/device_runtime.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

constexpr int kCuda13 = 13000;

enum class Release { kBeforeCuda13, kCuda13, kHip };

// CUDA 12 has cudaStreamGetCaptureInfo too, for a function with fewer arguments: only the version tells.
Release release_of(void* library, const std::string& prefix) {
  if (prefix == "hip") return Release::kHip;
  using VersionOf = int (*)(int* version);
  const auto version_of = reinterpret_cast<VersionOf>(dlsym(library, "cudaRuntimeGetVersion"));
  int version = 0;
  const bool known = version_of != nullptr && version_of(&version) == 0;
  return known && version >= kCuda13 ? Release::kCuda13 : Release::kBeforeCuda13;
}

bool has(Release release, FoundIn place) {
  switch (place) {
    case FoundIn::kEvery:
      return true;
    case FoundIn::kBeforeCuda13:
      return release != Release::kCuda13;
    case FoundIn::kCuda13:
      return release == Release::kCuda13;
    case FoundIn::kCuda:
    case FoundIn::kCudaDriver:
      return release != Release::kHip;
    case FoundIn::kHip:
      return release == Release::kHip;
  }
  return false;
}

DeviceRuntime lookup(void* library, const std::string& prefix) {
  const Release release = release_of(library, prefix);
  void* const loaded_driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);  // there if the runtime is
  void* const driver = loaded_driver != nullptr ? loaded_driver : RTLD_DEFAULT;
  DeviceRuntime runtime;
  for_each_entry_point(runtime, [&](auto& function, const char* name, FoundIn place) {
    if (!has(release, place)) return;
    const bool in_driver = place == FoundIn::kCudaDriver;
    void* const found = dlsym(in_driver ? driver : library, ((in_driver ? "cu" : prefix) + name).c_str());
    function = reinterpret_cast<std::decay_t<decltype(function)>>(found);
  });
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
