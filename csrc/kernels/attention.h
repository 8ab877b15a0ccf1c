// The contract between attention's driver (attention/attention.cc) and its kernels, which are compiled once per
// instruction set. Plain structs and function pointers only, as in kernel_set.h.
//
// What is computed, for one row (one token's query of one head), in fp32:
//
//     keys are cut into blocks of kKeysPerBlock by their position in the sequence, whatever else is asked in the call.
//     In a block:  s[k] = sum over d of q[d] * K[k, d]   one chain of fused multiply-adds, d ascending, q times scale
//                  s[k] = cap * tanh(s[k] / cap)         where there is a cap
//                  m = max s[k],  p[k] = exp(s[k] - m)   over the visible keys
//                  l = sum of p                          16 sums (position modulo 16), keys ascending, then a tree
//                  o[d] = sum over k of p[k] * V[k, d]   one chain of fused multiply-adds, visible keys ascending
//     Blocks are merged in ascending order (merge), a sink is one more block with l = 1 and o = 0, and the result is
//     o / l times the scale of the values, rounded once.
//
// So a row's bits depend on its query, its visible keys and their positions: not on the other rows of the call, on how
// rows and blocks are shared out, or on threads. Keys that are not visible are neither added nor multiplied by zero:
// what stands there may be anything. AVX512 and AVX2 give the same bits.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt {

// Zen 4 VM, 2 threads, AVX512, 2026-11-30, bf16, 8 heads to a key's, 128 wide: see doc/operators.md. Fewer keys are
// more merging and smaller steps; more leave threads without work in short sequences.
constexpr int kKeysPerBlock = 256;

// Rows are padded to whole vectors of the widest instruction set, with zeros.
constexpr int kAttentionPad = 16;
constexpr size_t padded_dim(size_t dim) { return (dim + kAttentionPad - 1) / kAttentionPad * kAttentionPad; }

// How keys and values are stored. Types of `KvType` index the tables below.
enum class KvType : int { kF32, kBf16, kF16, kE4m3 };
constexpr int kKvTypes = 4;

// The keys of a block that a row sees: positions [first, last), counted from the block's begin, and of the `tree_count`
// positions behind them those whose byte is not zero.
struct VisibleKeys {
  int first;
  int last;
  const uint8_t* tree;
  int tree_count;
  int end() const { return last + tree_count; }
};

// What a block gives, of `rows` rows: maxima and sums of each row, o in fp32. A row that sees no key has the maximum
// -infinity, the sum 0 and zeros.
struct AttentionPartial {
  float* maximum;
  float* sum;
  float* o;
  size_t o_stride;  // elements, a multiple of kAttentionPad
};

// One block of keys for rows that share a key's head.
struct AttentionBlock {
  const void* const* keys;       // one address for each position in [first, end), in pairs with `values`
  const void* const* values;     // all readable over dim and value_dim elements
  const void* const* next_keys;  // fetched meanwhile
  int next_count;
  int first;  // of the positions that any row sees, counted from the block's begin
  int end;
  const float* q;  // times the scale, as pack_queries gives them
  int dim;
  int value_dim;
  int rows;
  const VisibleKeys* visible;  // [rows]
  float cap;                   // 0 = none
  float* scores;               // [rows, kKeysPerBlock], 64-byte aligned
  float* panel;                // attention_panel_floats(dim), 64-byte aligned
  AttentionPartial partial;
};

// Keys turned around, or the values of a few columns, in fp32.
constexpr size_t attention_panel_floats(size_t dim) {
  const size_t keys = padded_dim(dim) * 32, values = size_t{kKeysPerBlock} * 32;
  return keys > values ? keys : values;
}

// Queries stand in groups of 8 rows: [ceil(rows / 8)][padded_dim][8], zeros where there is no row.
constexpr int kRowGroup = 8;
constexpr size_t packed_query_floats(size_t rows, size_t dim) {
  return (rows + kRowGroup - 1) / kRowGroup * kRowGroup * padded_dim(dim);
}

struct AttentionKernels {
  void (*block[kKvTypes])(const AttentionBlock& block);
  // total = total merged with a later block, of `rows` rows; a total or a block that saw no key changes nothing.
  void (*merge)(const AttentionPartial& total, const AttentionPartial& block, int rows, int value_dim);
  // One row: o / sum * scale, with the sink joining the sum where one is given, into `out` (value_dim floats, padded).
  void (*finish)(const AttentionPartial& total, int row, const float* sink, float scale, int value_dim, float* out);
  // A group of at most 8 queries of `dim` elements; types as KvType's first three.
  void (*pack_queries[3])(const void* const* queries, int rows, int dim, float scale, float* to);
  // fp32 to the same types, rounded to nearest even.
  void (*store_row[3])(const void* from, void* to, size_t count);
};

extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;

}  // namespace kt
