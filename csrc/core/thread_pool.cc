#include "core/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// How long a waiting thread keeps its core before it sleeps in the kernel. (Figures: Emerald Rapids VM, 2 threads,
// 2026-11-21, one token of RAWINT4, shape S, 1.4 ms a call.)
//
// Within a job, whose other threads compute for the same caller, long enough for any but a descheduled one. (With 20
// us, waits for the end of a phase had fallen asleep and cost 55 us a call; 1 ms itself is not tuned.)
constexpr microseconds kWithinJob{1000};
// Between jobs of a caller on the CPU longer than Python takes to make the next call, shorter than the attention
// between two layers, during which the cores belong to torch's threads. (With 20 us, a worker that had fallen asleep
// began 57 us after the call; direct calls of MXFP4 took 7 % longer with 50 us than with 100. With 300 us, a torch
// product of 0.16 ms between two calls took 0.36 ms. Yielding the core instead hands it to an OpenMP thread that spins,
// until the scheduler's next tick: 4 ms.)
constexpr microseconds kBetweenJobs{100};

// The word is looked at more often than the clock, whose reading would delay seeing it change.
constexpr int kPausesPerLook = 16;

void futex_wait(const std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void futex_wake_all(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

std::string text(int value) { return std::to_string(value); }

// Whether the word takes another value before our patience ends.
bool changes_soon(const std::atomic<uint32_t>& word, uint32_t value, microseconds patience) {
  const auto changed = [&] { return word.load(std::memory_order_acquire) != value; };
  const Clock::time_point begin = Clock::now();
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (changed()) return true;
      __builtin_ia32_pause();
    }
  } while (Clock::now() - begin < patience);
  return false;
}

void validate(const PoolConfig& config, const Topology& topology) {
  if (config.threads < 1) {
    throw std::invalid_argument("the number of CPU threads is " + text(config.threads) + "; it must be at least 1");
  }
  if (config.subpools < 1 || config.subpools > config.threads) {
    throw std::invalid_argument("the number of thread pools is " + text(config.subpools) +
                                "; it must be between 1 and the number of CPU threads (" + text(config.threads) + ")");
  }
  if (config.numa_nodes.empty()) return;
  if (static_cast<int>(config.numa_nodes.size()) != config.subpools) {
    throw std::invalid_argument("numa_nodes names " + text(static_cast<int>(config.numa_nodes.size())) + " nodes for " +
                                text(config.subpools) + " thread pools; give one node per pool");
  }
  for (int node : config.numa_nodes) {
    if (topology.find(node) != nullptr) continue;
    std::string usable;
    for (const NumaNode& n : topology.nodes) usable += (usable.empty() ? "" : ", ") + text(n.os_index);
    throw std::invalid_argument("numa_nodes names node " + text(node) +
                                ", which has no CPU core and memory this process may use; usable nodes are " + usable);
  }
}

}  // namespace

ThreadPools::ThreadPools(const PoolConfig& config, const Topology& topology) {
  validate(config, topology);
  const int node_count = static_cast<int>(topology.nodes.size());
  for (int p = 0; p < config.subpools; ++p) {
    numa_nodes_.push_back(config.numa_nodes.empty() ? topology.nodes[p % node_count].os_index : config.numa_nodes[p]);
    threads_per_subpool_.push_back(config.threads / config.subpools + (p < config.threads % config.subpools ? 1 : 0));
  }
  if (config.numa_nodes.empty() && config.subpools > node_count) {
    warnings_.push_back(text(config.subpools) + " thread pools on " + text(node_count) +
                        " NUMA node(s): several pools share a node");
  }

  for (int p = 0; p < config.subpools; ++p) {
    for (int i = 0; i < threads_per_subpool_[p]; ++i) {
      workers_.push_back(Worker{this, static_cast<int>(workers_.size()), p, i});
    }
  }
  place_workers(topology);
  if (topology.cpu_quota > 0 && config.threads > topology.cpu_quota + 0.5) {
    warnings_.push_back(text(config.threads) + " CPU threads but the cgroup grants only " +
                        std::to_string(topology.cpu_quota) + " CPUs");
  }
  try {
    for (int i = 1; i < threads(); ++i) {
      threads_.emplace_back([this, i] { worker_loop(i); });
      if (bound_) bind(i, threads_.back().native_handle());
    }
  } catch (const std::system_error& error) {
    stop();
    throw std::runtime_error("cannot start CPU thread " + text(static_cast<int>(threads_.size()) + 1) + " of " +
                             text(threads()) + " (" + error.what() + "); allow more threads or use fewer");
  }
}

void ThreadPools::place_workers(const Topology& topology) {
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
  for (const Worker& worker : workers_) {
    const size_t node = topology.find(numa_nodes_[worker.subpool]) - topology.nodes.data();
    const size_t core = first_core[node] + used[node]++;
    core_of_worker_.push_back(static_cast<int>(core));
    if (used[node] <= topology.nodes[node].cores.size()) worker_of_core_[core] = worker.index;
  }
  bound_ = true;
  for (size_t n = 0; n < used.size(); ++n) {
    const size_t cores = topology.nodes[n].cores.size();
    if (used[n] <= cores) continue;
    bound_ = false;
    warnings_.push_back(std::to_string(used[n]) + " CPU threads on NUMA node " + text(topology.nodes[n].os_index) +
                        ", which has " + std::to_string(cores) +
                        " physical core(s) for this process; more threads than cores slow every layer down");
  }
}

// A refused binding (a sandbox) costs speed, not correctness.
void ThreadPools::bind(int worker, pthread_t thread) const {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus_of_core_[core_of_worker_[worker]]) CPU_SET(cpu, &set);
  (void)pthread_setaffinity_np(thread, sizeof(set), &set);
}

// The scheduler puts the caller where it likes. If a worker is bound to that core, the two would take turns while
// another core idles: swap the worker to the core kept for the caller. (2 cores of a Xeon 6, 2026-11-21, calls 10 ms
// apart: 4.7 ms a token in half of the calls instead of 2.4 ms, with bound and with free workers alike.)
void ThreadPools::leave_callers_core() {
  const int cpu = sched_getcpu();
  if (!bound_ || cpu < 0 || cpu >= static_cast<int>(core_of_cpu_.size()) || core_of_cpu_[cpu] < 0) return;
  const int core = core_of_cpu_[cpu];
  const int worker = worker_of_core_[core];
  if (worker <= 0) return;
  std::swap(core_of_worker_[0], core_of_worker_[worker]);
  worker_of_core_[core] = 0;
  worker_of_core_[core_of_worker_[worker]] = worker;
  bind(worker, threads_[worker - 1].native_handle());
}

ThreadPools::~ThreadPools() { stop(); }

void ThreadPools::stop() {
  stopping_.store(true);
  job_epoch_.fetch_add(1);
  futex_wake_all(job_epoch_);
  for (std::thread& t : threads_) t.join();
}

void ThreadPools::run_erased(void* context, Entry entry) {
  context_ = context;
  entry_ = entry;
  if (threads() > 1) {
    leave_callers_core();
    job_epoch_.fetch_add(1);
    if (sleepers_.load() > 0) futex_wake_all(job_epoch_);
  }
  execute(workers_[0]);
  barrier();  // everybody is done with `context` when this returns
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPools::execute(const Worker& worker) {
  try {
    entry_(context_, worker);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

microseconds ThreadPools::between_jobs() const {
  return caller_.load(std::memory_order_relaxed) == Caller::kCpu ? kBetweenJobs : kBetweenLayersOfADevice;
}

void ThreadPools::worker_loop(int index) {
  const std::string name = "kt-worker-" + text(index);
  pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
  uint32_t seen = 0;
  while (true) {
    wait_while_equal(job_epoch_, seen, between_jobs());
    seen = job_epoch_.load(std::memory_order_acquire);
    if (stopping_.load()) return;
    execute(workers_[index]);
    barrier();
  }
}

void ThreadPools::barrier() {
  const uint32_t total = static_cast<uint32_t>(threads());
  if (total == 1) return;
  const uint32_t epoch = barrier_epoch_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == total) {
    arrived_.store(0, std::memory_order_relaxed);
    barrier_epoch_.fetch_add(1);
    if (sleepers_.load() > 0) futex_wake_all(barrier_epoch_);
    return;
  }
  wait_while_equal(barrier_epoch_, epoch, kWithinJob);
}

void ThreadPools::wait_while_equal(const std::atomic<uint32_t>& word, uint32_t value,
                                   std::chrono::microseconds patience) const {
  // Threads that share a core would keep each other from working: they sleep at once.
  if (bound_ && changes_soon(word, value, patience)) return;
  // The sleeper announces itself before it looks at the word again, and the waker changes the word before it looks for
  // sleepers (both sequentially consistent), so a wake-up cannot fall between.
  sleepers_.fetch_add(1);
  while (word.load() == value) futex_wait(word, value);
  sleepers_.fetch_sub(1);
}

}  // namespace kt
