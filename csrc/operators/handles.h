// Objects of Python that operators take as an integer: torch passes tensors and numbers only.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace kt {

template <class T>
class Handles {
 public:
  // The same number for the same object, as long as it lives.
  static int64_t of(const std::shared_ptr<T>& object) {
    const std::lock_guard<std::mutex> lock(table().mutex);
    const int64_t handle = reinterpret_cast<int64_t>(object.get());
    table().objects[handle] = object;
    return handle;
  }
  // Throws std::invalid_argument for numbers of no living object.
  static std::shared_ptr<T> find(int64_t handle) {
    const std::lock_guard<std::mutex> lock(table().mutex);
    const auto found = table().objects.find(handle);
    std::shared_ptr<T> object = found == table().objects.end() ? nullptr : found->second.lock();
    if (object == nullptr) throw std::invalid_argument("an operator got a handle of an object that is gone");
    return object;
  }

 private:
  struct Table {
    std::mutex mutex;
    std::unordered_map<int64_t, std::weak_ptr<T>> objects;
  };
  static Table& table() {
    static Table table;
    return table;
  }
};

}  // namespace kt
