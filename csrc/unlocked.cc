#include "unlocked.h"

#include <pthread.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace py = pybind11;

namespace kt {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Longer than any call that ends at all; a device that hangs must not keep the process.
constexpr seconds kGiveUp{30};
// Threads between two calls are in torch, say, which has no protection of its own: this long to begin the next call.
// (Zen 4 VM, load 7 on 2 cores, 2026-11-30: with it, 16 of 16 programs that ended while three threads called ended with
// status 0; where threads were refused instead of standing still, the first one aborted, in torch.)
constexpr milliseconds kBetweenCalls{20};

std::mutex mutex;
std::condition_variable changed;
int calls = 0;     // under way
int standing = 0;  // threads that stand still
bool ending = false;
std::thread::id ends_it;

bool must_stand_still() { return ending && std::this_thread::get_id() != ends_it; }

// Without Python's lock, until the process ends.
[[noreturn]] void stand_still(std::unique_lock<std::mutex> lock) {
  ++standing;
  changed.notify_all();
  lock.unlock();
  while (true) pause();
}

// A forked child has the thread that forked alone, and that is in no call.
void register_fork() {
  pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); },
                 [] {
                   calls = 0;
                   mutex.unlock();
                 });
}

void wait_for_calls() {
  const py::gil_scoped_release release;  // this thread ends the interpreter, so nothing stops it
  std::unique_lock<std::mutex> lock(mutex);
  ending = true;
  ends_it = std::this_thread::get_id();
  const auto until = std::chrono::steady_clock::now() + kGiveUp;
  int seen = -1;
  while (seen != standing && changed.wait_until(lock, until, [] { return calls == 0; })) {
    seen = standing;
    lock.unlock();
    std::this_thread::sleep_for(kBetweenCalls);
    lock.lock();
  }
}

}  // namespace

Unlocked::Unlocked() : thread_(PyEval_SaveThread()) {
  std::unique_lock<std::mutex> lock(mutex);
  if (must_stand_still()) stand_still(std::move(lock));
  ++calls;
}

Unlocked::~Unlocked() {
  {
    std::unique_lock<std::mutex> lock(mutex);
    if (must_stand_still()) {
      --calls;
      stand_still(std::move(lock));
    }
  }
  // If the end begins now, it waits until this thread is back in Python.
  PyEval_RestoreThread(thread_);
  const std::lock_guard<std::mutex> lock(mutex);
  --calls;
  changed.notify_all();
}

void bind_end() {
  register_fork();
  py::module_::import("atexit").attr("register")(py::cpp_function(&wait_for_calls));
}

}  // namespace kt
