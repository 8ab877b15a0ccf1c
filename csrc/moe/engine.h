// What the MoE layers of a process share: compute threads, the task queue, scratch memory.
#pragma once

#include <mutex>
#include <vector>

#include "core/memory.h"
#include "core/task_queue.h"
#include "core/thread_pool.h"
#include "kernels/kernel_set.h"

namespace kt {

// Scratch of one worker, reused by every call of every layer.
struct WorkerScratch {
  Buffer gathered;                    // activations of one expert, side by side
  Buffer product;                     // GEMM output of one piece
  Buffer decoded{kGemmScratchBytes};  // weights of one block (GemmArgs::scratch)
  Buffer sum;                         // weighted sums of one strip of hidden columns
};

class Engine {
 public:
  explicit Engine(const PoolConfig& config) : pools_(config, read_topology()), scratch_(pools_.threads()) {}

  ThreadPools& pools() { return pools_; }
  TaskQueue& queue() { return queue_; }
  WorkerScratch& scratch(int worker) { return scratch_[worker]; }

  // Holds the compute threads and the shared scratch; one call computes at a time.
  std::unique_lock<std::mutex> exclusive() { return std::unique_lock<std::mutex>(compute_mutex_); }

  Buffer& rows() { return rows_; }                  // hidden states in the kernel's activation type
  Buffer& intermediate() { return intermediate_; }  // SwiGLU output of every pair

 private:
  ThreadPools pools_;
  std::vector<WorkerScratch> scratch_;
  std::mutex compute_mutex_;
  Buffer rows_;
  Buffer intermediate_;
  TaskQueue queue_;  // last member: destroyed first, while what its tasks use still exists
};

}  // namespace kt
