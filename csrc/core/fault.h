// Failures made on purpose, for tests (tests/faults). KT_FAULT="point" or "point:n" lets the first, or the n-th, use of
// that point of each process fail, once; kt_kernel/faults.py has the points of both languages and says what fails.
//
// Where nothing was asked for, a point costs one load of a word that nobody writes.
#pragma once

#include <atomic>
#include <string>
#include <vector>

namespace kt {

enum class Fault { kAllocation, kThreadStart, kQueueTask, kDeviceCopy, kCount };

extern std::atomic<bool> faults_armed;

bool is_due(Fault point);

// Is this use of the point the one that is to fail?
inline bool fails(Fault point) { return faults_armed.load(std::memory_order_relaxed) && is_due(point); }

std::vector<std::string> fault_points();

// The `nth` use from now on fails; 0 = none. Throws std::invalid_argument for a point that there is not.
void arm_fault(const std::string& point, int nth);

}  // namespace kt
