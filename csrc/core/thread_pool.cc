#include "core/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "core/fault.h"

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
// When the caller has waited so long, it looks whether the workers that it waits for are running: whether their CPU
// time changes within kOfLooking. One that is not gets the caller's core, and the caller sleeps. (Zen 4 VM, 2 cores,
// 2026-11-30, one token of RAWINT4, shape S, with one / two other busy processes: 1.50 / 2.30 ms a call; without
// looking 1.76 / 2.40; sleeping after 50 us in any case 1.95 / 2.52, and without other processes 1.40 instead of 1.05.)
constexpr microseconds kBeforeLooking{50};
constexpr microseconds kOfLooking{20};
// Between jobs of a caller on the CPU longer than Python takes to make the next call, shorter than the attention
// between two layers, during which the cores belong to torch's threads. (With 20 us, a worker that had fallen asleep
// began 57 us after the call; direct calls of MXFP4 took 7 % longer with 50 us than with 100. With 300 us, a torch
// product of 0.16 ms between two calls took 0.36 ms. Yielding the core instead hands it to an OpenMP thread that spins,
// until the scheduler's next tick: 4 ms.)
constexpr microseconds kBetweenJobs{100};

// The word is looked at more often than the clock, whose reading would delay seeing it change.
constexpr int kPausesPerLook = 16;

// Counts tagged with the number of their job; `pieces(n)` is what is subtracted to take n off.
constexpr uint64_t pieces(int count) { return uint64_t{static_cast<uint32_t>(count)} << 32; }
constexpr uint64_t tagged(uint32_t job, int count) { return pieces(count) | job; }
constexpr uint32_t job_of(uint64_t tagged_count) { return static_cast<uint32_t>(tagged_count); }
constexpr int count_of(uint64_t tagged_count) { return static_cast<int32_t>(tagged_count >> 32); }

void futex_wait(const std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void futex_wake_all(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// The sleeper announces itself before it looks again, and the waker changes the word before it looks for sleepers
// (both sequentially consistent), so a wake-up cannot fall between.
template <class Reached>
void sleep_until(const std::atomic<uint32_t>& word, std::atomic<uint32_t>& sleepers, Reached reached) {
  sleepers.fetch_add(1);
  while (true) {
    const uint32_t value = word.load();
    if (reached()) break;
    futex_wait(word, value);
  }
  sleepers.fetch_sub(1);
}

void change_and_wake(std::atomic<uint32_t>& word, const std::atomic<uint32_t>& sleepers) {
  word.fetch_add(1);
  if (sleepers.load() > 0) futex_wake_all(word);
}

// Whether it is reached before our patience ends.
template <class Reached>
bool reached_soon(Reached reached, microseconds patience) {
  const Clock::time_point begin = Clock::now();
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (reached()) return true;
      __builtin_ia32_pause();
    }
  } while (Clock::now() - begin < patience);
  return false;
}

clockid_t cpu_clock(pthread_t thread) {
  clockid_t clock;
  return pthread_getcpuclockid(thread, &clock) == 0 ? clock : CLOCK_MONOTONIC;
}

// Nanoseconds for which the thread of a clock has run.
int64_t cpu_time(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
}

std::string text(int value) { return std::to_string(value); }

// A thread needs address space for its stack; the system's error is the same as for one thread too many.
std::string what_is_short() {
  constexpr size_t kStack = size_t{8} << 20;
  void* const stack = mmap(nullptr, kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) return "no address space is left for its stack: raise the limit (ulimit -v)";
  munmap(stack, kStack);
  return "allow more threads (ulimit -u, pids.max of the control group)";
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

std::vector<int> nodes_of_subpools(const PoolConfig& config, const Topology& topology) {
  validate(config, topology);
  if (!config.numa_nodes.empty()) return config.numa_nodes;
  std::vector<int> nodes;
  for (int p = 0; p < config.subpools; ++p) nodes.push_back(topology.nodes[p % topology.nodes.size()].os_index);
  return nodes;
}

std::vector<Worker> workers_of(const PoolConfig& config) {
  std::vector<Worker> workers;
  for (int p = 0; p < config.subpools; ++p) {
    const int count = config.threads / config.subpools + (p < config.threads % config.subpools ? 1 : 0);
    for (int i = 0; i < count; ++i) workers.push_back(Worker{static_cast<int>(workers.size()), p, i});
  }
  return workers;
}

std::vector<int> nodes_of_workers(const std::vector<Worker>& workers, const std::vector<int>& node_of_subpool) {
  std::vector<int> nodes;
  for (const Worker& worker : workers) nodes.push_back(node_of_subpool[worker.subpool]);
  return nodes;
}

}  // namespace

ThreadPools::ThreadPools(const PoolConfig& config, const Topology& topology)
    : numa_nodes_(nodes_of_subpools(config, topology)),
      workers_(workers_of(config)),
      threads_per_subpool_(config.subpools, 0),
      placement_(topology, nodes_of_workers(workers_, numa_nodes_), warnings_),
      stages_(kMaxPhases),
      shares_(kMaxPhases * config.subpools),
      activities_(config.threads) {
  for (const Worker& worker : workers_) ++threads_per_subpool_[worker.subpool];
  const int node_count = static_cast<int>(topology.nodes.size());
  if (config.numa_nodes.empty() && config.subpools > node_count) {
    warnings_.insert(warnings_.begin(), text(config.subpools) + " thread pools on " + text(node_count) +
                                            " NUMA node(s): several pools share a node");
  }
  if (topology.cpu_quota > 0 && config.threads > topology.cpu_quota + 0.5) {
    warnings_.push_back(text(config.threads) + " CPU threads but the cgroup grants only " +
                        std::to_string(topology.cpu_quota) + " CPUs");
  }
  try {
    for (int i = 1; i < threads(); ++i) {
      if (fails(Fault::kThreadStart)) throw std::system_error(EAGAIN, std::generic_category());
      threads_.emplace_back([this, i] { worker_loop(i); });
      activities_[i].clock = cpu_clock(threads_.back().native_handle());
      placement_.add(i, threads_.back().native_handle());
    }
  } catch (const std::system_error& error) {
    const std::string short_of = what_is_short();  // before the stacks of the others are free again
    stop();
    throw std::runtime_error("cannot start CPU thread " + text(static_cast<int>(threads_.size()) + 1) + " of " +
                             text(threads()) + " (" + error.what() + "); " + short_of + ", or use fewer threads");
  }
}

ThreadPools::~ThreadPools() { stop(); }

void ThreadPools::stop() {
  stopping_.store(true);
  job_.fetch_add(1);
  futex_wake_all(job_);
  for (std::thread& t : threads_) t.join();
}

// ---- the calling thread ----

void ThreadPools::run(std::initializer_list<Phase> phases, Caller caller) {
  if (phases.size() > kMaxPhases) {
    throw std::logic_error("got " + std::to_string(phases.size()) + " phases; expected at most " + text(kMaxPhases));
  }
  if (running_.exchange(true, std::memory_order_acquire)) {
    throw std::logic_error("a piece of a job has called the thread pools; they run one job at a time");
  }
  struct Ended {
    std::atomic<bool>& running;
    ~Ended() { running.store(false, std::memory_order_release); }
  } ended{running_};

  int64_t total = 0;
  for (const Phase& phase : phases) {
    for (int s = 0; s < subpools(); ++s) total += pieces_of(phase, s).count;
  }
  if (threads() == 1 || total <= 1) return run_alone(phases);

  caller_.store(caller, std::memory_order_relaxed);  // the job's start publishes it, and what follows
  failed_.store(false, std::memory_order_relaxed);
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
  int stage = 0;
  for (const Phase& phase : phases) stage += prepare(phase, stage, job) ? 1 : 0;
  placement_.leave_callers_core();
  change_and_wake(job_, idle_sleepers_);
  take_part(workers_[0], job);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPools::run_alone(std::initializer_list<Phase> phases) {
  for (const Phase& phase : phases) {
    for (int s = 0; s < subpools(); ++s) {
      const Range range = pieces_of(phase, s);
      for (int i = 0; i < range.count; ++i) phase.call_(phase.job_, workers_[0], s, range.first + i);
    }
  }
}

// Pieces that belong to no sub-pool are shared out by threads, so that few threads take from the same count.
ThreadPools::Range ThreadPools::pieces_of(const Phase& phase, int subpool) const {
  if (phase.counts_ != nullptr) return {0, phase.counts_[subpool]};
  int64_t before = 0;
  for (int s = 0; s < subpool; ++s) before += threads_in(s);
  const int begin = static_cast<int>(phase.count_ * before / threads());
  const int end = static_cast<int>(phase.count_ * (before + threads_in(subpool)) / threads());
  return {begin, end - begin};
}

// Returns whether the phase has pieces and needs the stage.
bool ThreadPools::prepare(const Phase& phase, int stage_index, uint32_t job) {
  int total = 0;
  for (int s = 0; s < subpools(); ++s) total += pieces_of(phase, s).count;
  if (total == 0) return false;
  Stage& stage = stages_[stage_index];
  stage.job = phase.job_;
  stage.call = phase.call_;
  stage.unfinished.store(tagged(job, total), std::memory_order_relaxed);
  for (int s = 0; s < subpools(); ++s) {
    Share& share = share_of(stage_index, s);
    share.range = pieces_of(phase, s);
    share.untaken.store(tagged(job, share.range.count), std::memory_order_release);
  }
  return true;
}

// ---- every thread ----

void ThreadPools::worker_loop(int index) {
  const std::string name = "kt-worker-" + text(index);
  pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
  uint32_t last = 0;
  while (true) {
    wait_for_job(last);
    last = job_.load(std::memory_order_acquire);
    if (stopping_.load()) return;
    take_part(workers_[index], last);
  }
}

void ThreadPools::wait_for_job(uint32_t last) {
  const auto another = [&] { return job_.load(std::memory_order_acquire) != last; };
  const bool on_cpu = caller_.load(std::memory_order_relaxed) == Caller::kCpu;
  // Threads that share a core would keep each other from working: they sleep at once.
  if (owns_cores() && reached_soon(another, on_cpu ? kBetweenJobs : kBetweenLayersOfADevice)) return;
  sleep_until(job_, idle_sleepers_, another);
}

// The caller stays until all is finished, workers only where another phase follows.
void ThreadPools::take_part(const Worker& worker, uint32_t job) {
  const auto belongs = [&](int stage) {
    return stage < kMaxPhases && job_of(stages_[stage].unfinished.load(std::memory_order_acquire)) == job;
  };
  for (int stage = 0; belongs(stage); ++stage) {
    compute_pieces(worker, stage, job);
    if (worker.index == 0 || belongs(stage + 1)) wait_for(worker, stages_[stage], job);
  }
}

// Takes pieces of its own sub-pool, then what the others have left.
void ThreadPools::compute_pieces(const Worker& worker, int stage, uint32_t job) {
  int computed = 0;
  for (int i = 0; i < subpools(); ++i) {
    const int subpool = (worker.subpool + i) % subpools();
    for (Taken taken; (taken = take(share_of(stage, subpool), job)).piece != kNone; ++computed) {
      if (taken.job != job) {  // our job is over; go on with this one
        job = taken.job;
        for (int before = 0; before < stage; ++before) wait_for(worker, stages_[before], job);
      }
      activities_[worker.index].in_piece.store(true, std::memory_order_relaxed);
      compute(worker, stages_[stage], subpool, taken.piece);
    }
  }
  if (computed == 0) return;
  activities_[worker.index].in_piece.store(false, std::memory_order_relaxed);
  const uint64_t before = stages_[stage].unfinished.fetch_sub(pieces(computed), std::memory_order_acq_rel);
  if (count_of(before) == computed) change_and_wake(finished_phases_, phase_sleepers_);
}

// Of `job`, or of a later one that has begun between the look and the subtraction.
ThreadPools::Taken ThreadPools::take(Share& share, uint32_t job) {
  const uint64_t seen = share.untaken.load(std::memory_order_relaxed);
  if (job_of(seen) != job || count_of(seen) <= 0) return {job, kNone};
  const uint64_t before = share.untaken.fetch_sub(pieces(1), std::memory_order_acquire);
  if (count_of(before) <= 0) return {job, kNone};
  return {job_of(before), share.range.first + share.range.count - count_of(before)};
}

void ThreadPools::compute(const Worker& worker, const Stage& stage, int subpool, int piece) {
  if (failed_.load(std::memory_order_relaxed)) return;
  try {
    stage.call(stage.job, worker, subpool, piece);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
    failed_.store(true, std::memory_order_relaxed);
  }
}

// For pieces that others have begun.
void ThreadPools::wait_for(const Worker& worker, const Stage& stage, uint32_t job) {
  const auto finished = [&] {
    const uint64_t unfinished = stage.unfinished.load(std::memory_order_acquire);
    return job_of(unfinished) != job || count_of(unfinished) == 0;
  };
  if (owns_cores()) {
    if (reached_soon(finished, kBeforeLooking)) return;
    if (worker.index == 0) note_cpu_times();
    if (reached_soon(finished, kOfLooking)) return;
    const int descheduled = worker.index == 0 ? descheduled_worker() : kNone;
    if (descheduled != kNone) {
      placement_.take_callers_core(descheduled);
    } else if (reached_soon(finished, kWithinJob)) {
      return;
    }
  }
  sleep_until(finished_phases_, phase_sleepers_, finished);
}

// Of the workers that have begun a piece. For the caller, which is not looked at itself.
void ThreadPools::note_cpu_times() {
  for (int worker = 1; worker < threads(); ++worker) {
    Activity& activity = activities_[worker];
    if (activity.in_piece.load(std::memory_order_relaxed)) activity.cpu_time = cpu_time(activity.clock);
  }
}

// One in a piece whose CPU time stands still.
int ThreadPools::descheduled_worker() const {
  for (int worker = 1; worker < threads(); ++worker) {
    const Activity& activity = activities_[worker];
    const bool in_piece = activity.in_piece.load(std::memory_order_relaxed);
    if (in_piece && cpu_time(activity.clock) == activity.cpu_time) return worker;
  }
  return kNone;
}

}  // namespace kt
