// Which CPUs this process's threads may be given, below what the system allows: several ranks share a host.
//
// The affinity of a thread does not say it: a library may have bound the calling thread alone to one core.
#pragma once

#include <vector>

namespace kt {

// From now on `read_topology` sees these CPUs (OS indices of hardware threads) only. Throws std::invalid_argument, and
// changes nothing, unless one of them is there for this process.
void allow_only_cpus(const std::vector<int>& cpus);

}  // namespace kt
