#include "attention/plan.h"

#include <algorithm>

namespace kt::attention {
namespace {

// Rows of a chunk: they share what is done once for a block of keys, and their state stays in L2.
int largest_chunk_rows(int dim) { return dim <= 256 ? 128 : 64; }
constexpr int kSmallestChunkRows = 16;
// Pieces for each thread, so that one that is late does not hold up the others.
constexpr int kPiecesPerThread = 4;

int64_t rounded_up(int64_t count, int64_t part) { return (count + part - 1) / part; }

int group_of(const AttentionArgs& args) { return args.q.heads / args.keys.heads; }

void read_sequences(const AttentionArgs& args, std::vector<Sequence>& sequences) {
  sequences.clear();
  const uint8_t* tree = args.tree;
  for (int i = 0; i < args.sequences; ++i) {
    Sequence s;
    s.length = args.lengths.at(i);
    s.new_tokens = args.new_tokens.data == nullptr ? 1 : args.new_tokens.at(i);
    s.first_row = args.first_rows.data == nullptr ? i : args.first_rows.at(i);
    s.slot_row = args.slots.table.data == nullptr ? 0 : args.slots.rows.at(i) * args.slots.row_stride;
    s.tree = tree;
    if (tree != nullptr) tree += s.new_tokens * s.new_tokens;
    sequences.push_back(s);
  }
}

int64_t first_visible(const AttentionArgs& args, const Sequence& s, int64_t token) {
  const int64_t position = s.length - s.new_tokens + token;
  const bool windowed = args.masking == Masking::kCausal && args.window > 0;
  return windowed ? std::max<int64_t>(0, position + 1 - args.window) : 0;
}

int64_t end_visible(const AttentionArgs& args, const Sequence& s, int64_t token) {
  if (args.masking == Masking::kNone || s.tree != nullptr) return s.length;
  return s.length - s.new_tokens + token + 1;
}

void add_chunks(const AttentionArgs& args, int chunk_rows, Plan& plan) {
  const int group = group_of(args);
  plan.chunks.clear();
  plan.products = 0;
  for (int i = 0; i < args.sequences; ++i) {
    const Sequence& s = plan.sequences[i];
    const int64_t rows = s.new_tokens * group;
    // Later tokens see more: the longest chunks begin first. All heads of a chunk are neighbours, as their keys are.
    for (int64_t c = rounded_up(rows, chunk_rows) - 1; c >= 0; --c) {
      const int64_t first = c * chunk_rows, end = std::min(first + chunk_rows, rows);
      const int64_t first_key = first_visible(args, s, first / group);
      const int64_t end_key = std::max(first_key, end_visible(args, s, (end - 1) / group));
      for (int head = 0; head < args.keys.heads; ++head) {
        plan.chunks.push_back({i, head, first, static_cast<int>(end - first),
                               static_cast<int>(first_key / kKeysPerBlock),
                               static_cast<int>(rounded_up(end_key, kKeysPerBlock)), 1, 0});
      }
      plan.products += static_cast<double>(args.keys.heads) * (end - first) * (end_key - first_key) *
                       (args.keys.columns + args.values.columns);
    }
  }
}

// Pieces go round the heads of a chunk, so that neighbours in memory are read at about the same time.
void add_pieces(const AttentionArgs& args, int wanted, Plan& plan) {
  int64_t blocks = 0;
  for (const Chunk& chunk : plan.chunks) blocks += chunk.end_block - chunk.first_block;
  const int64_t per_piece = std::max<int64_t>(1, blocks / wanted);
  // Few rows to a key wait for memory. (Zen 4 VM, 2 threads, 2026-11-30, one sequence of 32k, other work on the
  // machine: 8 heads to a key 10.8 GB/s, 4 heads 13.2, head by head 8.4 and 5.9.)
  const bool together = plan.largest_chunk <= kSmallestChunkRows && blocks / args.keys.heads >= wanted;
  plan.chunks_of_piece = together ? args.keys.heads : 1;
  const bool enough = static_cast<int>(plan.chunks.size()) / plan.chunks_of_piece >= wanted;
  plan.pieces.clear();
  plan.partials = 0;
  for (size_t first = 0; first < plan.chunks.size(); first += args.keys.heads) {
    const Chunk& like = plan.chunks[first];
    const int count = like.end_block - like.first_block;
    const int64_t parts = rounded_up(int64_t{count} * plan.chunks_of_piece, per_piece);
    const int pieces = enough || count == 0 ? 1 : static_cast<int>(std::min<int64_t>(parts, count));
    for (int head = 0; head < args.keys.heads; ++head) {
      plan.chunks[first + head].pieces = pieces;
      plan.chunks[first + head].partial = plan.partials;
      if (pieces > 1) plan.partials += static_cast<size_t>(count) * like.rows;
    }
    for (int p = 0; p < pieces; ++p) {
      const int begin = like.first_block + static_cast<int>(int64_t{count} * p / pieces);
      const int end = like.first_block + static_cast<int>(int64_t{count} * (p + 1) / pieces);
      for (int head = 0; head < args.keys.heads; head += plan.chunks_of_piece) {
        plan.pieces.push_back({static_cast<int>(first) + head, plan.chunks_of_piece, begin, end});
      }
    }
  }
}

}  // namespace

void make_plan(const AttentionArgs& args, int threads, Plan& plan) {
  read_sequences(args, plan.sequences);
  const int wanted = threads * kPiecesPerThread;
  int rows = largest_chunk_rows(args.keys.columns);
  add_chunks(args, rows, plan);
  while (static_cast<int>(plan.chunks.size()) < wanted && rows > kSmallestChunkRows) {
    rows /= 2;
    add_chunks(args, rows, plan);
  }
  plan.largest_chunk = 0;
  for (const Chunk& chunk : plan.chunks) plan.largest_chunk = std::max(plan.largest_chunk, chunk.rows);
  add_pieces(args, wanted, plan);
}

VisibleKeys visible_keys(const AttentionArgs& args, const Sequence& s, int64_t row, int64_t block) {
  const int64_t token = row / group_of(args), begin = block * kKeysPerBlock, end = begin + kKeysPerBlock;
  const auto in_block = [&](int64_t position) {
    return static_cast<int>(std::min(std::max(position, begin), end) - begin);
  };
  const int64_t first = first_visible(args, s, token);
  if (s.tree == nullptr || args.masking == Masking::kNone) {
    const int last = in_block(end_visible(args, s, token));
    return {std::min(in_block(first), last), last, nullptr, 0};
  }
  const int64_t tree_begin = std::max(s.length - s.new_tokens, first);
  const int last = in_block(tree_begin), tree_end = in_block(s.length);
  const uint8_t* bytes = s.tree + token * s.new_tokens + (begin + last - (s.length - s.new_tokens));
  return {std::min(in_block(first), last), last, bytes, tree_end - last};
}

}  // namespace kt::attention
