// Reads of a mapped file that somebody cuts off meanwhile. Without this, the first read behind the file's new end ends
// the process (SIGBUS), from whichever thread it comes; with it, reads get zeros and the watcher learns of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

// Of one mapping, as long as the object lives. Throws std::runtime_error where too many are watched at once.
class MappedReads {
 public:
  MappedReads(uintptr_t begin, size_t bytes);
  ~MappedReads();
  MappedReads(const MappedReads&) = delete;
  MappedReads& operator=(const MappedReads&) = delete;

  // Has any read met a page that the file does not have any more?
  bool cut_off() const;

 private:
  int slot_;
};

}  // namespace kt
