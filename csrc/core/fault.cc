#include "core/fault.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>

namespace kt {
namespace {

constexpr size_t kPoints = static_cast<size_t>(Fault::kCount);
constexpr std::array<const char*, kPoints> kNames = {"allocation", "thread-start", "queue-task", "device-copy"};

// Uses until the one that fails; 0 or less = none does.
std::array<std::atomic<int>, kPoints> uses_left;

size_t place_of(const std::string& point) { return std::find(kNames.begin(), kNames.end(), point) - kNames.begin(); }

// What the environment asks for. Mistakes in it are Python's to report, which knows all points.
bool armed_by_environment() {
  const char* const asked = std::getenv("KT_FAULT");
  if (asked == nullptr) return false;
  const std::string text = asked;
  const size_t colon = text.find(':');
  const size_t place = place_of(text.substr(0, colon));
  if (place == kPoints) return false;
  const int nth = colon == std::string::npos ? 1 : std::atoi(text.c_str() + colon + 1);
  uses_left[place].store(nth);
  return nth > 0;
}

}  // namespace

std::atomic<bool> faults_armed{armed_by_environment()};

bool is_due(Fault point) { return uses_left[static_cast<size_t>(point)].fetch_sub(1) == 1; }

std::vector<std::string> fault_points() { return {kNames.begin(), kNames.end()}; }

void arm_fault(const std::string& point, int nth) {
  const size_t place = place_of(point);
  if (place == kPoints) throw std::invalid_argument("there is no fault point '" + point + "' in the extension");
  uses_left[place].store(nth);
  faults_armed.store(std::any_of(uses_left.begin(), uses_left.end(), [](const auto& left) { return left > 0; }));
}

}  // namespace kt
