#include "core/arena.h"

#include <algorithm>
#include <map>
#include <mutex>

namespace kt {
namespace {

// Only pages that are written to count, so a buffer may well be larger than what will be in it.
constexpr size_t kBufferBytes = size_t{64} << 20;
constexpr size_t kAlignment = 64;

// The buffer of a node that is being filled.
struct Filling {
  std::weak_ptr<Buffer> buffer;
  size_t used = 0;
};

struct Arena {
  std::mutex mutex;
  std::map<int, Filling> by_node;
};

Arena& arena() {
  static Arena* const arena = new Arena;  // pieces may be made after static objects are gone
  return *arena;
}

}  // namespace

// No two pieces begin at the same address, even empty ones.
ArenaPiece::ArenaPiece(size_t bytes, int numa_node)
    : bytes_(std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment)) {
  const std::lock_guard<std::mutex> lock(arena().mutex);
  Filling& filling = arena().by_node[numa_node];
  buffer_ = filling.buffer.lock();
  if (buffer_ == nullptr || filling.used + bytes_ > buffer_->size()) {
    buffer_ = std::make_shared<Buffer>(std::max(bytes_, kBufferBytes), numa_node);
    filling = {buffer_, 0};
  }
  data_ = buffer_->data() + filling.used;
  filling.used += bytes_;
}

}  // namespace kt
