// For whom a task runs. It says how long threads keep their cores for the next task before they sleep in the kernel.
#pragma once

#include <chrono>

namespace kt {

enum class Caller { kCpu, kDeviceStream };

// Between the layers of a model a device computes attention, some 0.1 to 1 ms in a decode step, and leaves the CPU's
// cores to nobody else. (Not tuned, for want of a device. A thread that sleeps begins 57 us late, see
// thread_pool.cc.)
constexpr std::chrono::microseconds kBetweenLayersOfADevice{2000};

}  // namespace kt
