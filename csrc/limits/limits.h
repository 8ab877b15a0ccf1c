// What this machine can do at most, measured: the denominators of every figure that bench/ prints.
#pragma once

#include <cstddef>
#include <string>

#include "core/thread_pool.h"

namespace kt {

struct Limit {
  std::string how;    // the instructions used
  double per_second;  // bytes or operations
};

struct Limits {
  Limit read;      // bytes per second, sequential reads of `bytes` of memory shared by all threads
  Limit bf16_dot;  // operations per second of bf16 products summed in fp32, the best instruction that is active
  Limit int8_dot;  // of int8 times codes of 4 bits, the best way that is active: without VNNI eight products share 16
                   // bits
  Limit int8_widened;  // of int8 times codes of 8 bits: without VNNI every pair of products is widened by itself
  Limit f32_fma;
};

// The best of `repeats` runs of about 50 ms each, on all threads of `pools` at once.
Limits measure_limits(ThreadPools& pools, size_t bytes, int repeats);

}  // namespace kt
