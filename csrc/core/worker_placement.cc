#include "core/worker_placement.h"

#include <sched.h>

#include <algorithm>
#include <utility>

namespace kt {

WorkerPlacement::WorkerPlacement(const Topology& topology, const std::vector<int>& nodes,
                                 std::vector<std::string>& warnings) {
  std::vector<size_t> first_core;  // of each node, in our numbering
  for (const NumaNode& node : topology.nodes) {
    first_core.push_back(cpus_of_core_.size());
    for (const std::vector<int>& cpus : node.cores) {
      for (int cpu : cpus) {
        core_of_cpu_.resize(std::max<size_t>(core_of_cpu_.size(), cpu + 1), -1);
        core_of_cpu_[cpu] = static_cast<int>(cpus_of_core_.size());
      }
      cpus_of_core_.push_back(cpus);
    }
  }
  worker_of_core_.assign(cpus_of_core_.size(), -1);

  std::vector<size_t> used(topology.nodes.size(), 0);
  for (size_t worker = 0; worker < nodes.size(); ++worker) {
    const size_t node = topology.find(nodes[worker]) - topology.nodes.data();
    const size_t core = first_core[node] + used[node]++;
    core_of_worker_.push_back(static_cast<int>(core));
    if (used[node] <= topology.nodes[node].cores.size()) worker_of_core_[core] = static_cast<int>(worker);
  }
  for (size_t n = 0; n < used.size(); ++n) {
    const size_t cores = topology.nodes[n].cores.size();
    if (used[n] <= cores) continue;
    bound_ = false;
    warnings.push_back(std::to_string(used[n]) + " CPU threads on NUMA node " +
                       std::to_string(topology.nodes[n].os_index) + ", which has " + std::to_string(cores) +
                       " physical core(s) for this process; more threads than cores slow every layer down");
  }
}

void WorkerPlacement::add(int worker, pthread_t thread) {
  threads_.push_back(thread);
  if (bound_) bind(worker);
}

// A refused binding (a sandbox) costs speed, not correctness.
void WorkerPlacement::bind(int worker) const {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus_of_core_[core_of_worker_[worker]]) CPU_SET(cpu, &set);
  (void)pthread_setaffinity_np(threads_[worker - 1], sizeof(set), &set);
}

int WorkerPlacement::callers_core() const {
  const int cpu = sched_getcpu();
  return cpu < 0 || cpu >= static_cast<int>(core_of_cpu_.size()) ? -1 : core_of_cpu_[cpu];
}

void WorkerPlacement::leave_callers_core() {
  const int core = bound_ ? callers_core() : -1;
  if (core < 0 || worker_of_core_[core] <= 0) return;
  swap_with_caller(worker_of_core_[core]);
}

void WorkerPlacement::take_callers_core(int worker) {
  const int core = bound_ ? callers_core() : -1;
  if (core < 0 || worker_of_core_[core] > 0) return;
  worker_of_core_[core_of_worker_[0]] = -1;
  core_of_worker_[0] = core;
  swap_with_caller(worker);
}

void WorkerPlacement::swap_with_caller(int worker) {
  std::swap(core_of_worker_[0], core_of_worker_[worker]);
  worker_of_core_[core_of_worker_[0]] = 0;
  worker_of_core_[core_of_worker_[worker]] = worker;
  bind(worker);
}

}  // namespace kt
