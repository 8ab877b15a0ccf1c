// How a call of attention is shared out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/attention.h"

namespace kt::attention {

struct Sequence {
  int64_t length;      // positions
  int64_t first_row;   // of q
  int64_t slot_row;    // first entry of the slot table, elements
  int64_t new_tokens;  // the last of the positions
  const uint8_t* tree;
};

// Rows [first_row, first_row + rows) of a sequence under one head of the keys, a token's heads together.
struct Chunk {
  int sequence;
  int kv_head;
  int64_t first_row;
  int rows;
  int first_block;  // that any of its rows sees
  int end_block;
  int pieces;
  size_t partial;  // of the first block among the kept results; used with more than one piece
};

// Blocks of some heads' chunks: block by block, so that the rows of the cache are read where they stand together.
struct Piece {
  int first_chunk;
  int chunks;
  int first_block;
  int end_block;
};

struct Plan {
  std::vector<Sequence> sequences;
  std::vector<Chunk> chunks;
  std::vector<Piece> pieces;
  size_t partials;  // results of blocks that are kept, in rows
  int largest_chunk;
  int chunks_of_piece;  // 1, or all heads
  double products;      // multiplications and additions of all pieces, estimated
};

// Fills `plan`, whose memory is used again.
void make_plan(const AttentionArgs& args, int threads, Plan& plan);

// The keys of block `block` that row `row` of a sequence's head sees.
VisibleKeys visible_keys(const AttentionArgs& args, const Sequence& sequence, int64_t row, int64_t block);

}  // namespace kt::attention
