#include "core/release_later.h"

#include <mutex>
#include <utility>
#include <vector>

namespace kt {
namespace {

struct GivenUp {
  std::mutex mutex;
  std::vector<std::shared_ptr<void>> objects;
};

// Never destroyed: when the process ends, the interpreter that some of the objects need is gone.
GivenUp& given_up() {
  static auto* const all = new GivenUp;
  return *all;
}

}  // namespace

void release_later(std::shared_ptr<void> object) {
  std::lock_guard<std::mutex> lock(given_up().mutex);
  given_up().objects.push_back(std::move(object));
}

void release_now() {
  while (true) {
    std::vector<std::shared_ptr<void>> objects;
    {
      std::lock_guard<std::mutex> lock(given_up().mutex);
      objects.swap(given_up().objects);
    }
    if (objects.empty()) return;
  }  // destroyed here, without the lock
}

}  // namespace kt
