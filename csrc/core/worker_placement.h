// Which core each compute thread runs on: one core each, unless there are more threads than cores.
//
// The calling thread is worker 0 and nobody's to bind: one core is kept free for it, and the workers move out of its
// way. Only the calling thread of a job may call the functions that move workers.
#pragma once

#include <pthread.h>

#include <string>
#include <vector>

#include "core/topology.h"

namespace kt {

class WorkerPlacement {
 public:
  // `nodes[w]` is the NUMA node of worker w; warnings are added where threads must share cores.
  WorkerPlacement(const Topology& topology, const std::vector<int>& nodes, std::vector<std::string>& warnings);

  // Whether each worker has a core of its own.
  bool owns_cores() const { return bound_; }

  // Worker `worker` (not 0) runs as `thread` from now on.
  void add(int worker, pthread_t thread);

  // The scheduler puts the caller where it likes. If a worker is bound to that core, the two would take turns while
  // another core idles: swap the worker to the core kept for the caller. (2 cores of a Xeon 6, 2026-11-21, calls 10 ms
  // apart: 4.7 ms a token in half of the calls instead of 2.4 ms, with bound and with free workers alike.)
  void leave_callers_core();

  // The opposite, for a caller that is about to sleep until `worker` has finished: `worker`, which another process
  // keeps off its core, may use the caller's.
  void take_callers_core(int worker);

 private:
  void bind(int worker) const;
  void swap_with_caller(int worker);
  int callers_core() const;  // -1 = not ours

  bool bound_ = true;
  std::vector<std::vector<int>> cpus_of_core_;
  std::vector<int> core_of_cpu_;  // -1 = not ours
  std::vector<int> core_of_worker_;
  std::vector<int> worker_of_core_;  // -1 = none
  std::vector<pthread_t> threads_;   // of worker 1, 2, ...
};

}  // namespace kt
