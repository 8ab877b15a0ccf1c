// Page-aligned memory for weights and scratch: anonymous mmap, huge pages where the system allows, bound to a NUMA
// node by policy (the pages themselves appear at first touch).
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <utility>

namespace kt {

// MemoryError in Python.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

class Buffer {
 public:
  Buffer() = default;
  // Zero-filled; `numa_node` < 0 leaves placement to first touch. Throws OutOfMemory with the size asked for.
  explicit Buffer(size_t bytes, int numa_node = -1);
  // Bytes [offset, +bytes) of an open file, seen by all processes that map it, its pages spread over all nodes. Whole
  // huge pages: `offset` is a multiple of theirs, and the file is long enough. Throws as above.
  static Buffer of_file(int file, size_t offset, size_t bytes);
  // `bytes` in whole huge pages.
  static size_t rounded(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t size() const { return bytes_; }
  // Keeps the memory when it is large enough, otherwise replaces it (contents are lost).
  void reserve(size_t bytes, int numa_node = -1);

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace kt
