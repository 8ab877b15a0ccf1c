// Attention over a paged cache of keys and values, in place: the rows of `slots` say where each position of a sequence
// stands (page size 1), and nothing is gathered.
//
// A call is a number of sequences, each with `new_tokens` queries for its last positions: one in decoding, many in
// prefill, all of them in an encoder. The rows of a key's head (tokens x the heads that share it) are cut into chunks,
// the keys into blocks at fixed positions (kernels/attention.h), and the threads take pieces: (sequence, key's head,
// chunk, some blocks). A piece with all blocks of its chunk merges them as it goes; otherwise each block's result is
// kept, and whoever ends the last piece of a chunk merges them, in the same order. So a token's bits do not depend on
// the rest of the call or on the threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "kernels/attention.h"

namespace kt {

// [rows, heads, columns]; columns side by side.
struct HeadsView {
  uint8_t* data;
  KvType type;
  int heads;
  int columns;
  int64_t row_bytes;
  int64_t head_bytes;
  uint8_t* at(int64_t row, int head) const { return data + row * row_bytes + head * head_bytes; }
};

// Integers of 32 or 64 bits.
struct IndexView {
  const void* data = nullptr;
  int bytes = 8;
  int64_t stride = 1;  // elements
  int64_t at(int64_t i) const {
    return bytes == 8 ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
  }
};

// For each sequence the slots of its positions: row rows.at(i) of a table.
struct SlotTable {
  IndexView table;
  int64_t row_stride;  // elements
  IndexView rows;
};

enum class Masking { kCausal, kNone };

struct AttentionArgs {
  HeadsView q;    // one row for each query
  HeadsView out;  // the same rows and heads
  HeadsView keys;
  HeadsView values;
  int sequences;
  IndexView lengths;  // positions of each sequence, the new ones among them
  // Queries of each sequence and its first row of q; without data one each, in order.
  IndexView new_tokens;
  IndexView first_rows;
  // Without a table position p of a sequence stands in row first_row + p of keys and values.
  SlotTable slots;
  float scale;
  float key_scale = 1;
  float value_scale = 1;
  float cap = 0;         // of the scores; 0 = none
  int64_t window = 0;    // keys that a token sees, itself among them; 0 = all. Only where masked causally.
  HeadsView sinks = {};  // a row of a score without a value for each head; none without data
  // For each sequence [new_tokens, new_tokens], row by row, behind each other: which of the new keys a query sees.
  const uint8_t* tree = nullptr;
  Masking masking = Masking::kCausal;
};

class AttentionScratch;

// What calls need, kept from one to the next.
class Attention {
 public:
  Attention();
  ~Attention();
  // Holds the threads of `pools`: calls exclude each other.
  void run(ThreadPools& pools, const AttentionArgs& args);

 private:
  std::unique_ptr<AttentionScratch> scratch_;
};

}  // namespace kt
