#include "attention/attention.h"

#include <algorithm>
#include <cstring>

#include "attention/plan.h"
#include "formats/numbers.h"
#include "kernels/tiers.h"

namespace kt {

using attention::Chunk;
using attention::Piece;
using attention::Sequence;

namespace {

const AttentionKernels& kernels() {
  static const AttentionKernels& chosen =
      first_active<AttentionKernels>({{kAvx512Features, &kAttentionAvx512}, {kAvx2Features, &kAttentionAvx2}});
  return chosen;
}

// Multiply-adds up to which the calling thread computes alone: about 5 us, twice what waking others costs.
constexpr double kSmallCall = 256 << 10;

}  // namespace

// What one worker needs, side by side in one buffer.
struct WorkerMemory {
  Buffer memory;
  float *queries, *scores, *panel, *out;
  const void **keys, **values, **next, **rows;
  VisibleKeys* visible;
  AttentionPartial block;
  AttentionPartial total;  // of all heads of a piece, one behind the other
};

class AttentionScratch {
 public:
  attention::Plan plan;
  std::vector<WorkerMemory> workers;
  Buffer partials;                            // maximum, sum and o of every kept row
  std::vector<std::atomic<int>> open_pieces;  // of each chunk
  std::vector<float> sinks;                   // of each head

  void prepare(const AttentionArgs& args, int threads) {
    attention::make_plan(args, threads, plan);
    if (static_cast<int>(workers.size()) < threads) workers.resize(threads);
    value_stride = padded_dim(args.values.columns);
    for (WorkerMemory& worker : workers) lay_out(worker, args);
    partials.reserve(plan.partials * (value_stride + 2) * sizeof(float));
    if (open_pieces.size() < plan.chunks.size()) open_pieces = std::vector<std::atomic<int>>(2 * plan.chunks.size());
    read_sinks(args.sinks);
    for (size_t i = 0; i < plan.chunks.size(); ++i) {
      open_pieces[i].store(plan.chunks[i].pieces, std::memory_order_relaxed);
    }
  }

  // The kept result of a chunk's block.
  AttentionPartial kept(const Chunk& chunk, int block) const {
    const size_t row = chunk.partial + static_cast<size_t>(block - chunk.first_block) * chunk.rows;
    float* base = partials.as<float>();
    return {base + row, base + plan.partials + row, base + 2 * plan.partials + row * value_stride, value_stride};
  }

  size_t value_stride = 0;

 private:
  void read_sinks(const HeadsView& view) {
    sinks.resize(view.data == nullptr ? 0 : view.heads);
    for (size_t h = 0; h < sinks.size(); ++h) {
      const uint8_t* sink = view.at(0, static_cast<int>(h));
      switch (view.type) {
        case KvType::kBf16:
          sinks[h] = from_bf16(*reinterpret_cast<const uint16_t*>(sink));
          break;
        case KvType::kF16:
          sinks[h] = from_f16(*reinterpret_cast<const uint16_t*>(sink));
          break;
        default:
          sinks[h] = *reinterpret_cast<const float*>(sink);
      }
    }
  }

  void lay_out(WorkerMemory& w, const AttentionArgs& args) const {
    const size_t rows = plan.largest_chunk, dim = args.keys.columns;
    const size_t chunks = plan.chunks_of_piece;
    const size_t floats[] = {chunks * packed_query_floats(rows, dim),
                             rows * kKeysPerBlock,
                             attention_panel_floats(dim),
                             value_stride,
                             rows * value_stride,
                             chunks * rows * value_stride,
                             2 * (chunks + 1) * rows};
    size_t all = 0;
    for (const size_t count : floats) all += padded_dim(count);
    w.memory.reserve(all * sizeof(float) + 3 * kKeysPerBlock * sizeof(void*) +
                     rows * (sizeof(VisibleKeys) + sizeof(void*)));
    float* next = w.memory.as<float>();
    float* parts[7];
    for (int i = 0; i < 7; ++i) {
      parts[i] = next;
      next += padded_dim(floats[i]);
    }
    w.queries = parts[0], w.scores = parts[1], w.panel = parts[2], w.out = parts[3];
    w.block = {parts[6], parts[6] + rows, parts[4], value_stride};
    w.total = {parts[6] + 2 * rows, parts[6] + (2 + chunks) * rows, parts[5], value_stride};
    w.keys = reinterpret_cast<const void**>(next);
    w.values = w.keys + kKeysPerBlock;
    w.next = w.values + kKeysPerBlock;
    w.rows = w.next + kKeysPerBlock;
    w.visible = reinterpret_cast<VisibleKeys*>(w.rows + rows);
  }
};

namespace {

// The chunks of one head in a piece, on one worker.
class ChunkRun {
 public:
  ChunkRun(const AttentionArgs& args, AttentionScratch& scratch, int worker, const Piece& piece, int index)
      : args_(args),
        scratch_(scratch),
        w_(scratch.workers[worker]),
        number_(piece.first_chunk + index),
        chunk_(scratch.plan.chunks[number_]),
        sequence_(scratch.plan.sequences[chunk_.sequence]),
        group_(args.q.heads / args.keys.heads),
        queries_(w_.queries + index * packed_query_floats(scratch.plan.largest_chunk, args.keys.columns)) {
    const size_t rows = static_cast<size_t>(index) * scratch.plan.largest_chunk;
    total_ = {w_.total.maximum + rows, w_.total.sum + rows, w_.total.o + rows * w_.total.o_stride, w_.total.o_stride};
  }

  void begin() const {
    pack_queries();
    clear(total_);
  }

  // `next`: what is computed afterwards; null at the end.
  void compute(int block, const ChunkRun* next, int next_block) const {
    const int fetched = next == nullptr ? 0 : next->find_next(next_block);
    if (chunk_.pieces == 1) {
      compute_block(block, w_.block, fetched);
      kernels().merge(total_, w_.block, chunk_.rows, args_.values.columns);
    } else {
      compute_block(block, scratch_.kept(chunk_, block), fetched);
    }
  }

  void end() const {
    if (chunk_.pieces > 1) {
      if (scratch_.open_pieces[number_].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      for (int b = chunk_.first_block; b < chunk_.end_block; ++b) {
        kernels().merge(total_, scratch_.kept(chunk_, b), chunk_.rows, args_.values.columns);
      }
    }
    finish();
  }

 private:
  void clear(const AttentionPartial& partial) const {
    std::fill(partial.sum, partial.sum + chunk_.rows, 0.0f);
    std::fill(partial.o, partial.o + chunk_.rows * partial.o_stride, 0.0f);
  }

  int64_t row_of_call(int r) const { return sequence_.first_row + (chunk_.first_row + r) / group_; }
  int head(int r) const { return chunk_.kv_head * group_ + static_cast<int>((chunk_.first_row + r) % group_); }

  void pack_queries() const {
    const int dim = args_.keys.columns;
    for (int r = 0; r < chunk_.rows; ++r) w_.rows[r] = args_.q.at(row_of_call(r), head(r));
    for (int r = 0; r < chunk_.rows; r += kRowGroup) {
      kernels().pack_queries[static_cast<int>(args_.q.type)](w_.rows + r, std::min(kRowGroup, chunk_.rows - r), dim,
                                                             args_.scale * args_.key_scale,
                                                             queries_ + packed_query_floats(r, dim));
    }
  }

  // Addresses of [first, end) of a block.
  void find(const HeadsView& view, int block, int first, int end, const void** to) const {
    const int64_t begin = int64_t{block} * kKeysPerBlock, row_bytes = view.row_bytes;
    const uint8_t* base = view.at(0, chunk_.kv_head);
    const IndexView& table = args_.slots.table;
    if (table.data == nullptr) {
      for (int k = first; k < end; ++k) to[k] = base + (sequence_.first_row + begin + k) * row_bytes;
    } else if (table.bytes == 4) {
      const int32_t* slots = static_cast<const int32_t*>(table.data) + sequence_.slot_row + begin;
      for (int k = first; k < end; ++k) to[k] = base + slots[k] * row_bytes;
    } else {
      const int64_t* slots = static_cast<const int64_t*>(table.data) + sequence_.slot_row + begin;
      for (int k = first; k < end; ++k) to[k] = base + slots[k] * row_bytes;
    }
  }

  // The keys of a block as far as they exist, which are likely to be needed.
  int find_next(int block) const {
    const int64_t begin = int64_t{block} * kKeysPerBlock;
    const int count = static_cast<int>(std::min<int64_t>(kKeysPerBlock, sequence_.length - begin));
    find(args_.keys, block, 0, count, w_.next);
    return count;
  }

  void compute_block(int block, const AttentionPartial& partial, int fetched) const {
    int first = kKeysPerBlock, end = 0;
    for (int r = 0; r < chunk_.rows; ++r) {
      w_.visible[r] = attention::visible_keys(args_, sequence_, chunk_.first_row + r, block);
      if (w_.visible[r].first == w_.visible[r].end()) continue;
      first = std::min(first, w_.visible[r].first);
      end = std::max(end, w_.visible[r].end());
    }
    if (first >= end) {
      std::fill(partial.sum, partial.sum + chunk_.rows, 0.0f);
      return;
    }
    find(args_.keys, block, first, end, w_.keys);
    find(args_.values, block, first, end, w_.values);
    const AttentionBlock call = {w_.keys,
                                 w_.values,
                                 w_.next,
                                 fetched,
                                 first,
                                 end,
                                 queries_,
                                 args_.keys.columns,
                                 args_.values.columns,
                                 chunk_.rows,
                                 w_.visible,
                                 args_.cap,
                                 w_.scores,
                                 w_.panel,
                                 partial};
    kernels().block[static_cast<int>(args_.keys.type)](call);
  }

  void finish() const {
    for (int r = 0; r < chunk_.rows; ++r) {
      const float* sink = scratch_.sinks.empty() ? nullptr : &scratch_.sinks[head(r)];
      kernels().finish(total_, r, sink, args_.value_scale, args_.values.columns, w_.out);
      kernels().store_row[static_cast<int>(args_.out.type)](w_.out, args_.out.at(row_of_call(r), head(r)),
                                                            args_.values.columns);
    }
  }

  const AttentionArgs& args_;
  AttentionScratch& scratch_;
  const WorkerMemory& w_;
  const int number_;
  const Chunk& chunk_;
  const Sequence& sequence_;
  const int group_;
  float* const queries_;
  AttentionPartial total_;
};

void run_piece(const AttentionArgs& args, AttentionScratch& scratch, int worker, const Piece& piece) {
  const auto run = [&](int index) { return ChunkRun(args, scratch, worker, piece, index); };
  for (int i = 0; i < piece.chunks; ++i) run(i).begin();
  for (int block = piece.first_block; block < piece.end_block; ++block) {
    for (int i = 0; i < piece.chunks; ++i) {
      const int next_block = i + 1 < piece.chunks ? block : block + 1;
      const ChunkRun next = run((i + 1) % piece.chunks);
      run(i).compute(block, next_block < piece.end_block ? &next : nullptr, next_block);
    }
  }
  for (int i = 0; i < piece.chunks; ++i) run(i).end();
}

}  // namespace

Attention::Attention() : scratch_(new AttentionScratch) {}
Attention::~Attention() = default;

void Attention::run(ThreadPools& pools, const AttentionArgs& args) {
  AttentionScratch& scratch = *scratch_;
  scratch.prepare(args, pools.threads());
  const int pieces = static_cast<int>(scratch.plan.pieces.size());
  if (scratch.plan.products < kSmallCall) {
    for (int piece = 0; piece < pieces; ++piece) run_piece(args, scratch, 0, scratch.plan.pieces[piece]);
    return;
  }
  pools.for_each(pieces, [&](const Worker& worker, int piece) {
    run_piece(args, scratch, worker.index, scratch.plan.pieces[piece]);
  });
}

}  // namespace kt
