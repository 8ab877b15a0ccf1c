// Scenes of test_thread_pools.py: each runs jobs on thread pools of several shapes while signals stop the threads
// anywhere, as a scheduler might. A scene ends with status 0, or prints what was wrong.
//
//   thread_pools SCENE
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/thread_pool.h"

// This test's topology is made by hand and needs no hwloc.
const kt::NumaNode* kt::Topology::find(int os_index) const {
  for (const NumaNode& node : nodes) {
    if (node.os_index == os_index) return &node;
  }
  return nullptr;
}

namespace {

using kt::Phase;
using kt::ThreadPools;
using kt::Worker;

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what.c_str());
  std::_Exit(1);
}

// Two nodes of so many cores each; those that this machine lacks cannot be bound to, which the pools put up with.
kt::Topology two_nodes(int cores_each) {
  kt::Topology topology;
  for (int node = 0; node < 2; ++node) {
    topology.nodes.push_back({node, {}, 0});
    for (int core = 0; core < cores_each; ++core) topology.nodes[node].cores.push_back({node * cores_each + core});
  }
  return topology;
}

// With cores of their own threads spin while they wait; without, they sleep at once.
std::vector<std::unique_ptr<ThreadPools>> pools_of_many_shapes() {
  std::vector<std::unique_ptr<ThreadPools>> pools;
  for (const auto& [threads, subpools] : std::vector<std::pair<int, int>>{{1, 1}, {2, 1}, {3, 1}, {3, 3}, {5, 2}}) {
    for (const int cores : {1, 8}) {
      pools.push_back(std::make_unique<ThreadPools>(kt::PoolConfig{threads, subpools, {}}, two_nodes(cores)));
    }
  }
  return pools;
}

// ---- threads that stand still ----

std::atomic<int> standing{0};
std::atomic<bool> stand{false};

void stand_still(int) {
  standing.fetch_add(1);
  while (stand.load()) usleep(100);
  standing.fetch_sub(1);
}

void stand_still_briefly(int) { usleep(300); }

void handle(int signal, void (*handler)(int)) {
  struct sigaction action{};
  action.sa_handler = handler;
  sigaction(signal, &action, nullptr);
}

// Stops one of some threads after the other, anywhere, while it exists.
class Stopping {
 public:
  explicit Stopping(std::vector<pthread_t> threads) : threads_(std::move(threads)) {
    handle(SIGUSR1, stand_still_briefly);
    thread_ = std::thread([this] {
      std::mt19937 random(1);
      while (!ended_.load()) {
        pthread_kill(threads_[random() % threads_.size()], SIGUSR1);
        usleep(random() % 200);
      }
    });
  }
  ~Stopping() {
    ended_.store(true);
    thread_.join();
  }

 private:
  std::vector<pthread_t> threads_;
  std::atomic<bool> ended_{false};
  std::thread thread_;
};

// The pools' threads, caller included: every thread that a job of many slow pieces runs on.
std::vector<pthread_t> threads_of(ThreadPools& pools) {
  std::vector<std::atomic<pthread_t>> seen(pools.threads());
  std::atomic<int> count{0};
  while (count.load() < pools.threads()) {
    pools.for_each(64, [&](const Worker& worker, int) {
      pthread_t none{};
      if (seen[worker.index].compare_exchange_strong(none, pthread_self())) count.fetch_add(1);
      usleep(20);
    });
  }
  std::vector<pthread_t> threads;
  for (const auto& each : seen) threads.push_back(each.load());
  return threads;
}

// ---- jobs ----

// What a job refers to: lives as long as the call, and says so.
class Ledger {
 public:
  explicit Ledger(int pieces) : done_(pieces) {}
  ~Ledger() { alive_.store(false); }
  void enter(int piece) {
    require(alive_.load(), "a piece was computed after its job was over");
    require(done_[piece].fetch_add(1) == 0, "piece " + std::to_string(piece) + " was computed twice");
    finished_.fetch_add(1);
  }
  int finished() const { return finished_.load(); }
  int pieces() const { return static_cast<int>(done_.size()); }

 private:
  std::atomic<bool> alive_{true};
  std::vector<std::atomic<int>> done_;
  std::atomic<int> finished_{0};
};

void one_phase(ThreadPools& pools, int pieces) {
  Ledger ledger(pieces);
  std::vector<int> plain(pieces);  // whose values the caller must see
  pools.for_each(pieces, [&](const Worker& worker, int piece) {
    require(worker.index >= 0 && worker.index < pools.threads(), "a worker has an impossible index");
    ledger.enter(piece);
    plain[piece] = piece + 1;
  });
  require(ledger.finished() == pieces, "for_each returned before all pieces were finished");
  for (int i = 0; i < pieces; ++i) require(plain[i] == i + 1, "a piece's result is not seen by the caller");
}

void one_phase_in_subpools(ThreadPools& pools, int pieces) {
  std::vector<int> counts, first;
  int total = 0;
  for (int s = 0; s < pools.subpools(); ++s) {
    counts.push_back(s % 2 == 0 ? pieces : pieces / 3);
    first.push_back(total);
    total += counts.back();
  }
  Ledger ledger(total);
  pools.for_each_in_subpools(counts, [&](const Worker&, int subpool, int piece) {
    require(piece < counts[subpool], "a piece is outside its sub-pool's count");
    ledger.enter(first[subpool] + piece);
  });
  require(ledger.finished() == total, "for_each_in_subpools returned before all pieces were finished");
}

void dependent_phases(ThreadPools& pools, const std::vector<int>& counts) {
  std::vector<std::unique_ptr<Ledger>> ledgers;
  for (const int count : counts) ledgers.push_back(std::make_unique<Ledger>(count));
  const auto job = [&](size_t phase) {
    return [&, phase](const Worker&, int piece) {
      for (size_t before = 0; before < phase; ++before) {
        require(ledgers[before]->finished() == counts[before], "a phase began before the one before it was over");
      }
      ledgers[phase]->enter(piece);
    };
  };
  auto a = job(0), b = job(1), c = job(2), d = job(3);
  pools.run({Phase::of(counts[0], a), Phase::of(counts[1], b), Phase::of(counts[2], c), Phase::of(counts[3], d)});
  for (size_t p = 0; p < counts.size(); ++p) {
    require(ledgers[p]->finished() == counts[p], "a call returned before all phases were over");
  }
}

const std::vector<std::vector<int>> kPhases = {
    {1, 20, 8, 16}, {0, 3, 0, 1}, {50, 1, 1, 50}, {0, 0, 0, 0}, {2, 2, 2, 2}};

void jobs_of_all_kinds(ThreadPools& pools, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    for (const int pieces : {0, 1, 2, 3, 7, 100}) {
      one_phase(pools, pieces);
      one_phase_in_subpools(pools, pieces);
    }
    for (const std::vector<int>& counts : kPhases) dependent_phases(pools, counts);
  }
}

// ---- scenes ----

void every_piece_once() {
  for (const auto& pools : pools_of_many_shapes()) jobs_of_all_kinds(*pools, 300);
}

void threads_stopped_anywhere() {
  for (const auto& pools : pools_of_many_shapes()) {
    Stopping stopping(threads_of(*pools));
    jobs_of_all_kinds(*pools, 60);
  }
}

// Workers stand still from before a job's start to after its end, and after many more.
void late_workers() {
  handle(SIGUSR1, stand_still);
  for (const auto& pools : pools_of_many_shapes()) {
    const std::vector<pthread_t> threads = threads_of(*pools);
    for (const int awake : {0, 1}) {  // workers, beside the caller
      stand.store(true);
      int sent = 0;
      for (size_t i = 1 + awake; i < threads.size(); ++i, ++sent) pthread_kill(threads[i], SIGUSR1);
      while (standing.load() < sent) usleep(100);
      jobs_of_all_kinds(*pools, 20);
      require(standing.load() == sent, "the workers should have stood still meanwhile");
      stand.store(false);
      jobs_of_all_kinds(*pools, 20);
      while (standing.load() > 0) usleep(100);
    }
  }
}

void exceptions() {
  for (const auto& pools : pools_of_many_shapes()) {
    for (int round = 0; round < 50; ++round) {
      const int bad = round % 20;
      std::string seen;
      std::atomic<int> computed{0};
      std::atomic<bool> went_on{false};
      const auto first = [&](const Worker&, int piece) {
        if (piece == bad) throw std::runtime_error("piece " + std::to_string(piece));
        computed.fetch_add(1);
      };
      const auto second = [&](const Worker&, int) { went_on.store(true); };
      try {
        pools->run({Phase::of(20, first), Phase::of(20, second)});
      } catch (const std::runtime_error& error) {
        seen = error.what();
      }
      require(seen == "piece " + std::to_string(bad), "the exception of a piece did not reach the caller");
      require(computed.load() < 20, "the piece that threw was computed again");
      require(!went_on.load(), "a phase was computed after one that had failed");
      one_phase(*pools, 20);
    }
  }
}

void call_from_a_piece() {
  for (const auto& pools : pools_of_many_shapes()) {
    bool refused = false;
    try {
      pools->for_each(10, [&](const Worker&, int) { pools->for_each(2, [](const Worker&, int) {}); });
    } catch (const std::logic_error&) {
      refused = true;
    }
    require(refused, "a call from within a piece was not refused");
    one_phase(*pools, 20);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::map<std::string, void (*)()> scenes = {{"every_piece_once", every_piece_once},
                                                    {"threads_stopped_anywhere", threads_stopped_anywhere},
                                                    {"late_workers", late_workers},
                                                    {"exceptions", exceptions},
                                                    {"call_from_a_piece", call_from_a_piece}};
  require(count == 2 && scenes.count(arguments[1]) == 1, "expected the name of a scene");
  scenes.at(arguments[1])();
  return 0;
}
