// Compute threads, one sub-pool per NUMA node. The calling thread is worker 0 of sub-pool 0, so n threads compute and
// never n + 1. Idle workers spin, then sleep in the kernel.
//
//   for_each(count, job)                job(worker, piece) for every piece in [0, count)
//   for_each_in_subpools(counts, job)   job(worker, subpool, piece) for every piece in [0, counts[subpool]), by threads
//                                       of that sub-pool while it has idle ones: near the memory that it reads
//   run({phase, phase, ...})            the same for pieces that need what others have computed: a phase begins when
//                                       every piece of the one before has been finished
//
// Pieces are taken in ascending order. A call waits for pieces, not for threads: it returns when every piece has been
// finished, whoever computed it, so a worker that the scheduler keeps off its core delays the others by the piece that
// it has begun at most, and by none if it has begun none. Pieces should therefore be small, four or more a thread.
//
// A piece that throws lets the begun ones finish, the others are left out, and the call throws the first exception.
// How long idle workers spin depends on the caller of the last job (caller.h). Calls are not thread safe: the owner
// (Engine) serialises them. A call from within a piece throws std::logic_error.
//
// Why a late worker is harmless. Everything that a worker may look at without having taken a piece belongs to the pool
// and is atomic: `Share::untaken` and `Stage::unfinished`, each a count tagged with the number of its job.
//   - A piece is taken by subtracting 1 from the count of `untaken` where it was above 0; what the subtraction returns
//     says of which job j. Job j is not over then: that needs `unfinished` of this phase to be (j, 0), and the piece
//     just taken still counts there. So the job's function and what it refers to, which live on the caller's stack,
//     exist until the worker has subtracted its piece from `unfinished`, and it touches them no more after that.
//   - j is the job that the worker came for, unless that one ended and the next began since it looked. Then it computes
//     the piece for the next, after the phases before it: it waits for them as everybody does, and holds nobody up who
//     does not need that piece.
//   - The plain fields of a stage are written by the caller while no piece can be taken: after the last job's pieces
//     have all been finished (it acquires `unfinished`) and before `untaken` is stored with the new tag, by release.
//     They are read only after a piece was taken, by acquire from that store.
//   - A worker looks for pieces of a phase only after it saw (j, 0) in `unfinished` of all phases before. Another tag
//     there means that job j is over, and it goes back to waiting for the next.
// Tags have 32 bits: a worker would have to stand still for 2^32 jobs to take one for another. (A subtraction rather
// than a compare-and-swap, which many threads at once would repeat for one another.)
#pragma once

#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/caller.h"
#include "core/topology.h"
#include "core/worker_placement.h"

namespace kt {

struct PoolConfig {
  int threads = 1;
  int subpools = 1;
  std::vector<int> numa_nodes;  // OS index per sub-pool; empty = the machine's nodes in order, repeated if needed
};

struct Worker {
  int index;          // 0 .. threads-1
  int subpool;        // 0 .. subpools-1
  int index_in_pool;  // 0 .. threads of the sub-pool - 1
};

// Pieces that may be computed in any order and at the same time. Refers to `job` and `counts`, which must outlive it.
class Phase {
 public:
  // job(worker, piece) for every piece in [0, count)
  template <class Job>
  static Phase of(int count, Job& job) {
    return {count, nullptr, address(job),
            [](void* erased, const Worker& worker, int, int piece) { (*static_cast<Job*>(erased))(worker, piece); }};
  }

  // job(worker, subpool, piece) for every piece in [0, counts[subpool])
  template <class Job>
  static Phase in_subpools(const std::vector<int>& counts, Job& job) {
    return {0, counts.data(), address(job), [](void* erased, const Worker& worker, int subpool, int piece) {
              (*static_cast<Job*>(erased))(worker, subpool, piece);
            }};
  }

 private:
  friend class ThreadPools;
  using Call = void (*)(void* job, const Worker& worker, int subpool, int piece);

  Phase(int count, const int* counts, void* job, Call call) : count_(count), counts_(counts), job_(job), call_(call) {}
  template <class Job>
  static void* address(Job& job) {
    return const_cast<void*>(static_cast<const void*>(&job));
  }

  int count_;          // without counts_
  const int* counts_;  // per sub-pool, or null
  void* job_;
  Call call_;
};

class ThreadPools {
 public:
  static constexpr int kMaxPhases = 8;

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
  bool owns_cores() const { return placement_.owns_cores(); }

  template <class Job>
  void for_each(int count, Job&& job, Caller caller = Caller::kCpu) {
    run({Phase::of(count, job)}, caller);
  }

  template <class Job>
  void for_each_in_subpools(const std::vector<int>& counts, Job&& job, Caller caller = Caller::kCpu) {
    run({Phase::in_subpools(counts, job)}, caller);
  }

  // One to kMaxPhases phases; those without pieces cost nothing.
  void run(std::initializer_list<Phase> phases, Caller caller = Caller::kCpu);

 private:
  static constexpr int kNone = -1;
  struct Range {
    int first;
    int count;
  };
  struct Taken {
    uint32_t job;
    int piece;  // or kNone
  };
  // A phase's pieces of one sub-pool.
  struct alignas(64) Share {
    std::atomic<uint64_t> untaken{0};  // pieces << 32 | job; below 0 when more threads asked for the last one
    Range range{0, 0};
  };
  // A phase of the running job, or of the last one that had so many.
  struct alignas(64) Stage {
    std::atomic<uint64_t> unfinished{0};  // pieces << 32 | job
    void* job = nullptr;
    Phase::Call call = nullptr;
  };
  // What the caller may know about a worker.
  struct alignas(64) Activity {
    std::atomic<bool> in_piece{false};  // it has taken a piece and not finished it
    clockid_t clock = 0;                // counts its CPU time
    int64_t cpu_time = 0;               // nanoseconds, when the caller looked
  };

  void run_alone(std::initializer_list<Phase> phases);
  Range pieces_of(const Phase& phase, int subpool) const;
  bool prepare(const Phase& phase, int stage_index, uint32_t job);
  Share& share_of(int stage, int subpool) { return shares_[stage * subpools() + subpool]; }
  void take_part(const Worker& worker, uint32_t job);
  void compute_pieces(const Worker& worker, int stage, uint32_t job);
  static Taken take(Share& share, uint32_t job);
  void compute(const Worker& worker, const Stage& stage, int subpool, int piece);
  void wait_for(const Worker& worker, const Stage& stage, uint32_t job);
  void note_cpu_times();
  int descheduled_worker() const;
  void wait_for_job(uint32_t last);
  void worker_loop(int index);
  void stop();

  std::vector<int> numa_nodes_;  // of each sub-pool
  std::vector<Worker> workers_;
  std::vector<int> threads_per_subpool_;
  std::vector<std::string> warnings_;
  WorkerPlacement placement_;

  std::vector<Stage> stages_;
  std::vector<Share> shares_;         // [stage][sub-pool]
  std::vector<Activity> activities_;  // of each worker
  std::atomic<bool> running_{false};

  alignas(64) std::atomic<uint32_t> job_{0};  // number of the last one
  std::atomic<uint32_t> idle_sleepers_{0};    // threads that wait in the kernel for `job_` to change
  alignas(64) std::atomic<uint32_t> finished_phases_{0};
  std::atomic<uint32_t> phase_sleepers_{0};  // the same, for `finished_phases_`
  std::mutex error_mutex_;
  std::exception_ptr error_;  // the first of the running job
  std::atomic<bool> failed_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<Caller> caller_{Caller::kCpu};  // of the last job
  std::vector<std::thread> threads_;
};

}  // namespace kt
