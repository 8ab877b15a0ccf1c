// Attention over SGLang's cache of keys and values (attention/attention.h), and writing into it.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "formats/numbers.h"
#include "kernels/tiers.h"
#include "operators/registry.h"

namespace kt {
namespace {

[[noreturn]] void refuse(const char* name, const TensorView& tensor, const std::string& expected) {
  throw std::invalid_argument(std::string("attention got ") + name + " " + tensor.text() + "; expected " + expected);
}

KvType kv_type(const TensorView& tensor, const char* name) {
  switch (tensor.type) {
    case ElementType::kF32:
      return KvType::kF32;
    case ElementType::kBf16:
      return KvType::kBf16;
    case ElementType::kF16:
      return KvType::kF16;
    case ElementType::kE4m3:
      return KvType::kE4m3;
    default:
      refuse(name, tensor, "float32, bfloat16, float16, or float8_e4m3fn in the cache");
  }
}

// [rows, heads, columns], of which the last stand side by side.
HeadsView heads_view(const TensorView& tensor, const char* name) {
  if (tensor.dims != 3 || (tensor.stride(2) != 1 && tensor.size(2) != 1)) {
    refuse(name, tensor, "three dimensions, the last without gaps");
  }
  const int64_t bytes = static_cast<int64_t>(bytes_of(tensor.type));
  return {tensor.bytes(),
          kv_type(tensor, name),
          static_cast<int>(tensor.size(1)),
          static_cast<int>(tensor.size(2)),
          tensor.stride(0) * bytes,
          tensor.stride(1) * bytes};
}

// The same of rows of activations.
HeadsView activations_view(const TensorView& tensor, const char* name) {
  const HeadsView view = heads_view(tensor, name);
  if (view.type == KvType::kE4m3) refuse(name, tensor, "float32, bfloat16 or float16");
  return view;
}

IndexView index_view(const TensorView& tensor, const char* name) {
  if (tensor.dims != 1 || (tensor.type != ElementType::kI32 && tensor.type != ElementType::kI64)) {
    refuse(name, tensor, "a vector of int32 or int64");
  }
  return {tensor.data, static_cast<int>(bytes_of(tensor.type)), tensor.stride(0)};
}

SlotTable slot_table(const TensorView& table, const TensorView& rows) {
  if (table.dims != 2 || (table.type != ElementType::kI32 && table.type != ElementType::kI64) ||
      (table.stride(1) != 1 && table.size(1) > 1)) {
    refuse("req_to_token", table, "a matrix of int32 or int64 without gaps in its rows");
  }
  return {
      {table.data, static_cast<int>(bytes_of(table.type)), 1}, table.stride(0), index_view(rows, "req_pool_indices")};
}

HeadsView sinks_view(const TensorView& sinks, int heads) {
  if (!sinks.given()) return {};
  const KvType type = kv_type(sinks, "sinks");
  if (sinks.dims != 1 || sinks.size(0) != heads || type == KvType::kE4m3) {
    refuse("sinks", sinks, "one number for each of " + std::to_string(heads) + " heads");
  }
  return {sinks.bytes(), type, heads, 1, 0, sinks.stride(0) * static_cast<int64_t>(bytes_of(sinks.type))};
}

void check_shapes(const AttentionArgs& args, const TensorView& q, const TensorView& out, const TensorView& keys,
                  const TensorView& values) {
  if (args.keys.columns != args.q.columns || args.q.heads % args.keys.heads != 0) {
    refuse("keys", keys, "heads and columns that fit the queries, which are " + q.text());
  }
  if (args.values.heads != args.keys.heads || args.values.type != args.keys.type || args.values.columns < 1) {
    refuse("values", values, "heads and a type like the keys', which are " + keys.text());
  }
  if (args.out.heads != args.q.heads || args.out.columns != args.values.columns || out.size(0) < q.size(0)) {
    refuse("an output", out, "rows and heads of the queries, which are " + q.text() + ", and columns of the values");
  }
}

void refuse_encoders(bool is_cross, const TensorView& encoder_lengths) {
  if (is_cross || encoder_lengths.given()) {
    throw std::invalid_argument("attention to an encoder's keys was asked for; expected a decoder alone");
  }
}

// Rows of new keys or values that go into a cache.
struct Stored {
  HeadsView from;
  HeadsView cache;
  int64_t rows;
  int64_t slots;  // of the cache
};

Stored stored(const TensorView& from, const TensorView& cache, const char* name) {
  TensorView rows = from;
  if (rows.dims == 2) {  // [rows, heads * columns]
    rows.dims = 3;
    rows.sizes = {from.size(0), cache.size(1), cache.size(2)};
    rows.strides = {from.stride(0), cache.size(2), from.stride(1)};
  }
  const Stored result = {heads_view(rows, name), heads_view(cache, "a cache"), rows.size(0), cache.size(0)};
  if (result.from.heads != result.cache.heads || result.from.columns != result.cache.columns ||
      from.elements() != rows.elements()) {
    refuse(name, from, "rows like the cache's, which is " + cache.text());
  }
  return result;
}

void widen_head(const HeadsView& from, int64_t row, int head, std::vector<float>& to) {
  to.resize(from.columns);
  const uint8_t* data = from.at(row, head);
  for (int d = 0; d < from.columns; ++d) {
    switch (from.type) {
      case KvType::kBf16:
        to[d] = from_bf16(reinterpret_cast<const uint16_t*>(data)[d]);
        break;
      case KvType::kF16:
        to[d] = from_f16(reinterpret_cast<const uint16_t*>(data)[d]);
        break;
      default:
        to[d] = reinterpret_cast<const float*>(data)[d];
    }
  }
}

void store_row(const Stored& s, int64_t row, int64_t slot) {
  static const AttentionKernels& kernels =
      first_active<AttentionKernels>({{kAvx512Features, &kAttentionAvx512}, {kAvx2Features, &kAttentionAvx2}});
  constexpr int64_t kBytes[kKvTypes] = {4, 2, 2, 1};
  const int64_t head_bytes = s.from.columns * kBytes[static_cast<int>(s.from.type)];
  std::vector<float> widened;
  for (int head = 0; head < s.from.heads; ++head) {
    if (s.from.type == s.cache.type) {
      std::memcpy(s.cache.at(slot, head), s.from.at(row, head), head_bytes);
    } else {
      widen_head(s.from, row, head, widened);
      kernels.store_row[static_cast<int>(s.cache.type)](widened.data(), s.cache.at(slot, head), s.from.columns);
    }
  }
}

// Numbers below which one thread has copied before others have woken up (1-3 us).
constexpr int64_t kWorthSharing = 64 << 10;
constexpr int kRowsOfAPiece = 16;

void store(Engine& engine, const std::vector<Stored>& all, const IndexView& slots) {
  const int64_t rows = all.empty() ? 0 : all[0].rows;
  const auto copy = [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const int64_t slot = slots.at(row);
      for (const Stored& s : all) {
        if (slot < 0 || slot >= s.slots) {
          throw std::invalid_argument("slot " + std::to_string(slot) + " of the cache was to be written; it has " +
                                      std::to_string(s.slots));
        }
        store_row(s, row, slot);
      }
    }
  };
  if (rows <= kRowsOfAPiece || rows * all[0].from.heads * all[0].from.columns < kWorthSharing) return copy(0, rows);
  engine.pools().for_each(static_cast<int>((rows + kRowsOfAPiece - 1) / kRowsOfAPiece), [&](const Worker&, int piece) {
    copy(int64_t{piece} * kRowsOfAPiece, std::min<int64_t>(rows, int64_t{piece + 1} * kRowsOfAPiece));
  });
}

// Both may come from rows of any of the types; the cache must not be of 8 bits unless they are.
void check_types(const Stored& s, const TensorView& from) {
  const bool eight = s.cache.type == KvType::kE4m3 || s.from.type == KvType::kE4m3;
  if (eight && s.cache.type != s.from.type) refuse("new keys or values", from, "the type of an 8-bit cache");
}

void store_cache(Call& call) {
  const TensorView k = call.tensor(0), v = call.tensor(1), k_cache = call.tensor(2), v_cache = call.tensor(3);
  const TensorView indices = call.tensor(4);
  const IndexView slots = index_view(indices, "indices");
  const Stored keys = stored(k, k_cache, "keys"), values = stored(v, v_cache, "values");
  check_types(keys, k);
  check_types(values, v);
  if (keys.from.heads * int64_t{keys.from.columns} != call.integer(5) || values.rows != keys.rows ||
      indices.size(0) != keys.rows) {
    refuse("keys", k,
           "as many rows as there are values and indices, of " + std::to_string(call.integer(5)) + " numbers");
  }
  call.run([=](Engine& engine) { store(engine, {keys, values}, slots); });
}

// Arguments that both operators have, by where they stand.
struct Positions {
  int q, out, keys, values, key_scale, value_scale, table, rows, lengths, scale, cap, cross, window, encoder, sinks;
};

AttentionArgs common_args(const Call& call, const Positions& at, const TensorView& keys, const TensorView& values) {
  refuse_encoders(call.flag(at.cross), call.optional_tensor(at.encoder));
  const TensorView q = call.tensor(at.q), out = call.tensor(at.out), lengths = call.tensor(at.lengths);
  AttentionArgs args;
  args.q = activations_view(q, "queries");
  args.out = activations_view(out, "an output");
  args.keys = heads_view(keys, "keys");
  args.values = heads_view(values, "values");
  check_shapes(args, q, out, keys, values);
  args.sequences = static_cast<int>(lengths.size(0));
  args.lengths = index_view(lengths, "seq_lens");
  args.slots = slot_table(call.tensor(at.table), call.tensor(at.rows));
  args.scale = static_cast<float>(call.number(at.scale));
  args.key_scale = static_cast<float>(call.number(at.key_scale));
  args.value_scale = static_cast<float>(call.number(at.value_scale));
  args.cap = static_cast<float>(call.number(at.cap));
  args.window = std::max<int64_t>(0, call.integer(at.window));
  args.sinks = sinks_view(call.optional_tensor(at.sinks), args.q.heads);
  return args;
}

void decode(Call& call) {
  const TensorView k_buffer = call.tensor(1), v_buffer = call.tensor(2);
  const TensorView key = call.optional_tensor(6), value = call.optional_tensor(7), loc = call.optional_tensor(8);
  const AttentionArgs args =
      common_args(call, {0, 5, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16, 17, 18}, k_buffer, v_buffer);
  if (call.tensor(0).size(0) < args.sequences) refuse("queries", call.tensor(0), "one for each sequence");
  std::vector<Stored> written;
  if (key.given()) written.push_back(stored(key, k_buffer, "keys"));
  // Compressed caches: the values are a part of the keys' rows.
  if (value.given() && v_buffer.data != k_buffer.data) written.push_back(stored(value, v_buffer, "values"));
  for (const Stored& s : written) check_types(s, key);
  const IndexView slots = written.empty() ? IndexView{} : index_view(loc, "loc");
  call.run([=](Engine& engine) {
    store(engine, written, slots);
    engine.attention().run(engine.pools(), args);
  });
}

void check_new_tokens(const AttentionArgs& args, const TensorView& tree, bool has_table) {
  int64_t seen = 0;
  for (int i = 0; i < args.sequences; ++i) {
    const int64_t fresh = args.new_tokens.at(i), length = args.lengths.at(i);
    seen += fresh * fresh;
    if (fresh > length || (!has_table && fresh != length)) {
      throw std::invalid_argument("attention got " + std::to_string(fresh) + " new of " + std::to_string(length) +
                                  " tokens; expected " + (has_table ? "at most as many" : "all, without a cache"));
    }
  }
  if (tree.given() && (tree.elements() < seen || bytes_of(tree.type) != 1)) {
    refuse("tree_mask", tree, std::to_string(seen) + " or more bytes: [new tokens, new tokens] of each sequence");
  }
}

void extend(Call& call) {
  const TensorView k = call.optional_tensor(1), v = call.optional_tensor(2), k_buffer = call.tensor(4);
  // A compressed cache cannot hold these keys: they are attended to where they stand.
  const bool own =
      k.given() && v.given() && k.dims == 3 && (k.size(1) != k_buffer.size(1) || k.size(2) != k_buffer.size(2));
  AttentionArgs args = common_args(call, {0, 3, 4, 5, 6, 7, 8, 9, 10, 14, 15, 16, 17, 18, 19}, own ? k : k_buffer,
                                   own ? v : call.tensor(5));
  args.new_tokens = index_view(call.tensor(11), "extend_seq_lens");
  args.first_rows = index_view(call.tensor(12), "extend_start_loc");
  const TensorView tree = call.optional_tensor(20);
  args.tree = tree.as<uint8_t>();
  args.masking = call.flag(21) ? Masking::kCausal : Masking::kNone;
  if (own) args.slots = {};
  check_new_tokens(args, tree, !own);
  call.run([=](Engine& engine) { engine.attention().run(engine.pools(), args); });
}

}  // namespace

std::vector<Operator> attention_operators() {
  return {
      // k, v [tokens, heads, columns] into rows `indices` of the caches [slots, heads, columns]; row_dim = heads x
      // columns
      {"sgl_kernel::store_cache_cpu(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor indices, "
       "int row_dim) -> ()",
       store_cache},
      // query [sequences, heads, dim] -> output [sequences, heads, value_dim]. key and value, where given, are written
      // to `loc` first. sliding_window_size counts the keys a token sees, itself among them; 0 or less: all.
      {"sgl_kernel::decode_attention_cpu(Tensor query, Tensor(a!) k_buffer, Tensor(b!) v_buffer, float k_scale, "
       "float v_scale, Tensor(c!) output, Tensor? key, Tensor? value, Tensor? loc, Tensor attn_logits, "
       "Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, float sm_scale, float logit_cap, "
       "bool is_cross_attn, int sliding_window_size, Tensor? encoder_lens, Tensor? sinks) -> ()",
       decode},
      // The same for the last extend_seq_lens positions of each sequence, whose keys and values are in the buffers.
      // tree_mask: [new tokens, new tokens] of each sequence behind each other, in place of the causal order.
      {"sgl_kernel::extend_attention_cpu(Tensor q_extend, Tensor? k_extend, Tensor? v_extend, Tensor(a!) o_extend, "
       "Tensor k_buffer, Tensor v_buffer, float k_scale, float v_scale, Tensor req_to_token, Tensor req_pool_indices, "
       "Tensor seq_lens, Tensor extend_seq_lens, Tensor extend_start_loc, int max_len_extend, float sm_scale, "
       "float logit_cap, bool is_cross_attn, int sliding_window_size, Tensor? encoder_lens, Tensor? sinks, "
       "Tensor? tree_mask, bool is_causal) -> ()",
       extend},
  };
}

}  // namespace kt
