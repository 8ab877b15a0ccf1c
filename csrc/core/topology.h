// NUMA nodes and physical cores this process may use, from hwloc: cpusets and memory-less nodes are respected,
// hyper-threads count once, and a cgroup CPU quota is reported beside the cores.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

struct NumaNode {
  int os_index = 0;
  std::vector<std::vector<int>> cores;  // allowed physical cores, each as the OS indices of its hardware threads
  uint64_t memory_bytes = 0;
};

struct Topology {
  std::vector<NumaNode> nodes;  // nodes with at least one allowed core, ascending os_index
  double cpu_quota = 0;         // CPUs' worth of time per period the cgroup grants; 0 = unlimited

  int physical_cores() const;
  const NumaNode* find(int os_index) const;
};

// Reads the machine anew at each call (a cpuset may change); throws std::runtime_error when hwloc fails.
Topology read_topology();

}  // namespace kt
