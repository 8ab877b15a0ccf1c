#include "core/memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "core/fault.h"

namespace kt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

void* reserved(size_t bytes) {
  if (fails(Fault::kAllocation)) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

// mbind(2) with MPOL_PREFERRED: a full node spills to its neighbours instead of killing the process.
void prefer_node(void* data, size_t bytes, int node) {
  constexpr int kMpolPreferred = 1;
  constexpr int kBitsPerWord = 8 * sizeof(unsigned long);
  unsigned long mask[16] = {};
  if (node < 0 || node >= 16 * kBitsPerWord) return;
  mask[node / kBitsPerWord] = 1ul << (node % kBitsPerWord);
  // Containers may forbid the call; first touch by the node's own threads then places the pages as well.
  (void)syscall(SYS_mbind, data, bytes, kMpolPreferred, mask, 16 * kBitsPerWord, 0);
}

// mbind(2) with MPOL_INTERLEAVE over the nodes that this process may take memory from: whoever touches a page first,
// processes on all nodes read it.
void spread_over_nodes(void* data, size_t bytes) {
  constexpr int kMpolInterleave = 3;
  constexpr int kMpolAllowed = 4;  // MPOL_F_MEMS_ALLOWED
  unsigned long mask[16] = {};
  constexpr int kBits = 16 * 8 * sizeof(unsigned long);
  if (syscall(SYS_get_mempolicy, nullptr, mask, kBits, nullptr, kMpolAllowed) != 0) return;
  (void)syscall(SYS_mbind, data, bytes, kMpolInterleave, mask, kBits, 0);
}

[[noreturn]] void throw_no_memory(size_t bytes) {
  throw OutOfMemory("could not reserve " + std::to_string(bytes) + " bytes of memory: " + std::strerror(errno));
}

// `bytes` of zeros, whole huge pages and aligned to them: one page more is taken and the ends are given back.
uint8_t* reserve_pages(size_t bytes) {
  void* const raw = reserved(bytes + kHugePage);
  if (raw == MAP_FAILED) throw_no_memory(bytes);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > begin) munmap(raw, aligned - begin);
  const size_t tail = kHugePage - (aligned - begin);
  if (tail > 0) munmap(reinterpret_cast<void*>(aligned + bytes), tail);
  return reinterpret_cast<uint8_t*>(aligned);
}

}  // namespace

size_t Buffer::rounded(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

Buffer Buffer::of_file(int file, size_t offset, size_t bytes) {
  Buffer buffer;
  if (bytes == 0) return buffer;
  buffer.bytes_ = rounded(bytes);
  buffer.data_ = reserve_pages(buffer.bytes_);
  void* mapped = mmap(buffer.data_, buffer.bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file,
                      static_cast<off_t>(offset));
  if (mapped == MAP_FAILED) throw_no_memory(bytes);
  madvise(buffer.data_, buffer.bytes_, MADV_HUGEPAGE);
  spread_over_nodes(buffer.data_, buffer.bytes_);
  return buffer;
}

Buffer::Buffer(size_t bytes, int numa_node) {
  if (bytes == 0) return;
  bytes_ = rounded(bytes);
  data_ = reserve_pages(bytes_);
  madvise(data_, bytes_, MADV_HUGEPAGE);
  if (numa_node >= 0) prefer_node(data_, bytes_, numa_node);
}

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void Buffer::reserve(size_t bytes, int numa_node) {
  if (bytes <= bytes_) return;
  *this = Buffer();  // give the old pages back first: the two never exist together
  *this = Buffer(bytes, numa_node);
}

}  // namespace kt
