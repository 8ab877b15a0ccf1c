// Compute threads, one sub-pool per NUMA node. The thread that calls `run` is worker 0 of sub-pool 0, so n threads
// compute and never n + 1. Idle workers spin, then sleep in the kernel.
//
//   run(job)            caller and workers execute job(worker); returns when all have finished
//   worker.barrier()    inside a job: waits for every worker of every sub-pool
//
// A job that throws on any thread lets the others finish; `run` then throws the first exception. A job that uses the
// barrier must not throw: the others would wait for it.
//
// How long idle workers spin depends on the caller of the last job (caller.h).
//
// `run` is not reentrant and not thread safe: the owner (Engine) serialises calls.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/caller.h"
#include "core/topology.h"

namespace kt {

struct PoolConfig {
  int threads = 1;
  int subpools = 1;
  std::vector<int> numa_nodes;  // OS index per sub-pool; empty = the machine's nodes in order, repeated if needed
};

class ThreadPools;

struct Worker {
  ThreadPools* pools;
  int index;          // 0 .. threads-1
  int subpool;        // 0 .. subpools-1
  int index_in_pool;  // 0 .. threads of the sub-pool - 1
  void barrier() const;
};

class ThreadPools {
 public:
  // Throws std::invalid_argument with a sentence for every impossible configuration.
  ThreadPools(const PoolConfig& config, const Topology& topology);
  ~ThreadPools();
  ThreadPools(const ThreadPools&) = delete;
  ThreadPools& operator=(const ThreadPools&) = delete;

  int threads() const { return static_cast<int>(workers_.size()); }
  int subpools() const { return static_cast<int>(threads_per_subpool_.size()); }
  int threads_in(int subpool) const { return threads_per_subpool_[subpool]; }
  int subpool_of(int worker) const { return workers_[worker].subpool; }
  int node_of(int subpool) const { return numa_nodes_[subpool]; }
  const std::vector<int>& numa_nodes() const { return numa_nodes_; }
  const std::vector<int>& threads_per_subpool() const { return threads_per_subpool_; }
  const std::vector<std::string>& warnings() const { return warnings_; }

  // Whether each worker has a core of its own; where they share cores, waiting threads should sleep.
  bool owns_cores() const { return bound_; }

  template <class Job>
  void run(Job& job, Caller caller = Caller::kCpu) {
    caller_.store(caller, std::memory_order_relaxed);  // the job's start publishes it
    run_erased(&job, [](void* context, const Worker& worker) { (*static_cast<Job*>(context))(worker); });
  }

  // job(worker, piece) for every piece in [0, count), on the caller and the workers. Returns when all have finished.
  template <class Job>
  void for_each(int count, Job&& job, Caller caller = Caller::kCpu) {
    std::atomic<int> next{0};
    auto take = [&](const Worker& worker) {
      for (int piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < count;) job(worker, piece);
    };
    run(take, caller);
  }

  // job(worker, subpool, piece) for pieces [0, counts[s]) of each sub-pool s, computed by its own workers.
  template <class Job>
  void for_each_in_subpools(const std::vector<int>& counts, Job&& job, Caller caller = Caller::kCpu) {
    std::vector<std::atomic<int>> next(counts.size());
    auto take = [&](const Worker& worker) {
      const int count = counts[worker.subpool];
      for (int piece; (piece = next[worker.subpool].fetch_add(1, std::memory_order_relaxed)) < count;) {
        job(worker, worker.subpool, piece);
      }
    };
    run(take, caller);
  }

 private:
  friend struct Worker;
  using Entry = void (*)(void* context, const Worker& worker);

  void run_erased(void* context, Entry entry);
  void execute(const Worker& worker);
  void worker_loop(int index);
  std::chrono::microseconds between_jobs() const;
  void place_workers(const Topology& topology);
  void bind(int worker, pthread_t thread) const;
  void leave_callers_core();
  void stop();
  void barrier();
  void wait_while_equal(const std::atomic<uint32_t>& word, uint32_t value, std::chrono::microseconds patience) const;

  std::vector<Worker> workers_;
  std::vector<int> threads_per_subpool_;
  std::vector<int> numa_nodes_;
  std::vector<std::string> warnings_;

  // Where workers run, unless there are more of them than cores: one core each. The calling thread is worker 0 and
  // nobody's to bind: `core_of_worker_[0]` is the core kept free for it.
  bool bound_ = false;
  std::vector<std::vector<int>> cpus_of_core_;
  std::vector<int> core_of_cpu_;  // -1 = not ours
  std::vector<int> core_of_worker_;
  std::vector<int> worker_of_core_;  // -1 = none

  alignas(64) std::atomic<uint32_t> job_epoch_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> barrier_epoch_{0};
  alignas(64) mutable std::atomic<uint32_t> sleepers_{0};
  void* context_ = nullptr;
  Entry entry_ = nullptr;
  std::mutex error_mutex_;
  std::exception_ptr error_;  // the first of the running job
  std::atomic<bool> stopping_{false};
  std::atomic<Caller> caller_{Caller::kCpu};  // of the last job
  std::vector<std::thread> threads_;
};

inline void Worker::barrier() const { pools->barrier(); }

}  // namespace kt
