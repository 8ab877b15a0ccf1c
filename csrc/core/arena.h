// Memory for matrices that stay: several of them share a buffer. Each in a buffer of its own would take up to a huge
// page more: 0.3 GB beside the 0.8 GB of Qwen3-30B's dense layers in 4 bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/memory.h"

namespace kt {

// Zero-filled and aligned to 64 bytes. The buffer goes when nothing in it is left.
class ArenaPiece {
 public:
  // On that NUMA node, < 0 leaves placement to first touch. Throws std::runtime_error with the size asked for.
  ArenaPiece(size_t bytes, int numa_node);

  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  std::shared_ptr<Buffer> buffer_;
  uint8_t* data_;
  size_t bytes_;
};

}  // namespace kt
