// Calls without Python's lock, and the end of the interpreter.
//
// Once the interpreter ends, Python (before 3.14) makes any other thread that takes its lock exit on the spot. That
// unwinds the stack through destructors that must not throw: std::terminate. So from then on a thread that leaves or
// begins a call of ours stands still, as any thread does in Python 3.14, and the end waits for calls under way.
#pragma once

#include <pybind11/pybind11.h>

namespace kt {

// In place of pybind11::gil_scoped_release.
class Unlocked {
 public:
  Unlocked();
  ~Unlocked();
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* thread_;
};

// Lets the end of this interpreter wait for calls.
void bind_end();

}  // namespace kt
