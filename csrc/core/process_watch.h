// Has another process of this machine ended? A zombie has, and so has one whose number belongs to a younger process.
#pragma once

#include <string>

namespace kt {

class ProcessWatch {
 public:
  // A process that runs now; `pid` as this process's /proc names it.
  explicit ProcessWatch(int pid);

  int pid() const { return pid_; }
  bool ended() const;

 private:
  int pid_;
  std::string started_;  // when, as the kernel counts; empty: it had ended already
};

}  // namespace kt
