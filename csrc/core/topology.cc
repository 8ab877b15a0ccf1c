#include "core/topology.h"

#include <hwloc.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "core/allowed_cpus.h"

namespace kt {
namespace {

struct TopologyDeleter {
  void operator()(hwloc_topology_t t) const { hwloc_topology_destroy(t); }
};
using TopologyHandle = std::unique_ptr<std::remove_pointer_t<hwloc_topology_t>, TopologyDeleter>;

std::mutex allowed_mutex;
std::vector<int> allowed_cpus;  // empty = all that the system allows

// False where none of them is in `topology`, which stays as it is.
bool restrict_to(hwloc_topology_t topology, const std::vector<int>& cpus) {
  hwloc_bitmap_t set = hwloc_bitmap_alloc();
  for (const int cpu : cpus) hwloc_bitmap_set(set, static_cast<unsigned>(cpu));
  const bool done = hwloc_topology_restrict(topology, set, 0) == 0;
  hwloc_bitmap_free(set);
  return done;
}

TopologyHandle load() {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) throw std::runtime_error("hwloc_topology_init failed");
  TopologyHandle handle(raw);
  // By default hwloc drops what the cpuset of this process excludes: that is what we want to see.
  if (hwloc_topology_load(raw) != 0) throw std::runtime_error("hwloc could not read this machine's topology");
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  if (!allowed_cpus.empty() && !restrict_to(raw, allowed_cpus)) {
    throw std::runtime_error("none of the CPUs that this process was given is there any more");
  }
  return handle;
}

// cgroup v2 writes "quota period" or "max period" in cpu.max; v1 has one file for each.
double read_cgroup_quota() {
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period) return quota == "max" || period <= 0 ? 0 : std::stod(quota) / period;
  std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double value = 0;
  if ((v1_quota >> value) && (v1_period >> period) && value > 0 && period > 0) return value / period;
  return 0;
}

}  // namespace

int Topology::physical_cores() const {
  int count = 0;
  for (const NumaNode& node : nodes) count += static_cast<int>(node.cores.size());
  return count;
}

const NumaNode* Topology::find(int os_index) const {
  for (const NumaNode& node : nodes) {
    if (node.os_index == os_index) return &node;
  }
  return nullptr;
}

void allow_only_cpus(const std::vector<int>& cpus) {
  const TopologyHandle handle = load();
  if (cpus.empty() || *std::min_element(cpus.begin(), cpus.end()) < 0 || !restrict_to(handle.get(), cpus)) {
    throw std::invalid_argument("this process was given " + std::to_string(cpus.size()) +
                                " CPUs, expected at least one that is there for it");
  }
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  allowed_cpus = cpus;
}

Topology read_topology() {
  const TopologyHandle handle = load();
  hwloc_topology_t topology = handle.get();
  Topology result;
  result.cpu_quota = read_cgroup_quota();

  // Platforms without core information expose processing units only.
  const bool has_cores = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE) > 0;
  const hwloc_obj_type_t core_type = has_cores ? HWLOC_OBJ_CORE : HWLOC_OBJ_PU;
  const int node_count = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_NUMANODE);
  for (int n = 0; n < node_count; ++n) {
    const hwloc_obj_t numa = hwloc_get_obj_by_type(topology, HWLOC_OBJ_NUMANODE, static_cast<unsigned>(n));
    if (numa->attr->numanode.local_memory == 0) continue;  // a CPU-only node cannot hold weights
    NumaNode node;
    node.os_index = static_cast<int>(numa->os_index);
    node.memory_bytes = numa->attr->numanode.local_memory;
    hwloc_obj_t core = nullptr;
    while ((core = hwloc_get_next_obj_inside_cpuset_by_type(topology, numa->cpuset, core_type, core)) != nullptr) {
      std::vector<int> threads;
      for (int cpu = hwloc_bitmap_first(core->cpuset); cpu >= 0; cpu = hwloc_bitmap_next(core->cpuset, cpu)) {
        threads.push_back(cpu);
      }
      node.cores.push_back(std::move(threads));
    }
    if (!node.cores.empty()) result.nodes.push_back(std::move(node));  // memory-only nodes (CXL, HBM) run nothing
  }
  std::sort(result.nodes.begin(), result.nodes.end(),
            [](const NumaNode& a, const NumaNode& b) { return a.os_index < b.os_index; });
  if (result.nodes.empty()) {
    throw std::runtime_error("no NUMA node with both memory and a CPU core that this process may use was found");
  }
  return result;
}

}  // namespace kt
