// What the MoE layers of a process share: compute threads, the task queue, scratch memory.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "core/memory.h"
#include "core/task_queue.h"
#include "core/thread_pool.h"
#include "kernels/kernel_set.h"

namespace kt {

// Scratch of one worker, reused by every call of every layer.
struct WorkerScratch {
  Buffer gathered;  // activations of one expert, side by side
  Buffer product;   // GEMM output of one piece
  Buffer gate;      // the same of gate alone, while up's is computed
  Buffer kernel;    // GemmArgs::scratch
  Buffer row;       // one row of hidden states in fp32
  Buffer sum;       // weighted sums of one strip of hidden columns
  Buffer decoded;   // training: a block of weights as bf16, and the same transposed
};

// What a pass computes on its way, of all tokens: shared by all calls, or owned by a layer that needs it afterwards.
struct PassBuffers {
  Buffer hidden;              // hidden states as gate's kernel multiplies them
  Buffer hidden_of_up;        // the same for up's, where that is not the same kernel
  Buffer intermediate;        // SwiGLU output of every pair
  Buffer prepared;            // the same as the kernel multiplies it, where that is not what SwiGLU gives
  std::deque<Buffer> linear;  // the tokens of a linear layer, once for each kind of kernel of its parts
  // Training: the LoRA as its kernels read it, gradients of the outputs and of what they were computed from.
  Buffer lora;
  Buffer gradients;
  Buffer gate_gradient;
  Buffer up_gradient;
  Buffer thin;
};

// What forward calls have cost since the engine began; only calls that multiplied at least one expert count.
struct EngineStats {
  int64_t calls;
  double seconds;  // of computing, without waiting for other calls
  int64_t bytes;   // stored weights of the distinct experts of each call: what a call must read at least once
};

class Engine {
 public:
  explicit Engine(const PoolConfig& config) : pools_(config, read_topology()), scratch_(pools_.threads()) {}

  // Throws std::runtime_error in a forked child: it has this engine's memory, but none of its threads.
  void require_own_process() const {
    if (belongs_to_this_process()) return;
    throw std::runtime_error("these experts belong to process " + std::to_string(process_) + ", and its forked child " +
                             std::to_string(getpid()) +
                             " has none of the threads that compute them; call them in that process, or start the "
                             "child by spawn and load the experts there");
  }
  bool belongs_to_this_process() const { return process_ == getpid(); }

  ThreadPools& pools() { return pools_; }
  TaskQueue& queue() { return queue_; }
  WorkerScratch& scratch(int worker) { return scratch_[worker]; }

  // Holds the compute threads and the shared scratch; one call computes at a time.
  std::unique_lock<std::mutex> exclusive() { return std::unique_lock<std::mutex>(compute_mutex_); }

  // Safe on any thread; figures of a call that ends meanwhile may be in or out, each on its own.
  EngineStats stats() const { return {calls_.load(), 1e-9 * nanoseconds_.load(), bytes_.load()}; }
  void count_call(std::chrono::nanoseconds time, int64_t bytes) {
    calls_.fetch_add(1, std::memory_order_relaxed);
    nanoseconds_.fetch_add(time.count(), std::memory_order_relaxed);
    bytes_.fetch_add(bytes, std::memory_order_relaxed);
  }

  std::unique_lock<std::mutex> exclusive_if_free() {
    return std::unique_lock<std::mutex>(compute_mutex_, std::try_to_lock);
  }

  PassBuffers& pass_buffers() { return pass_buffers_; }
  Attention& attention() { return attention_; }

 private:
  const pid_t process_ = getpid();
  ThreadPools pools_;
  std::vector<WorkerScratch> scratch_;
  std::mutex compute_mutex_;
  PassBuffers pass_buffers_;
  Attention attention_;
  std::atomic<int64_t> calls_{0};
  std::atomic<int64_t> nanoseconds_{0};
  std::atomic<int64_t> bytes_{0};
  // Last member: destroyed first, while what its tasks use still exists.
  TaskQueue queue_{pools_.owns_cores() ? Spinning::kAfterDevices : Spinning::kNever};
};

}  // namespace kt
