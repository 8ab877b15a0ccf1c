// libFuzzer on what the extension makes of bytes that come from files and requests: panels of every format, routing.
// Built and run by scripts/fuzz.sh native (clang with libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer).
//
// Every buffer has exactly the bytes that the code may touch, on the heap, so that one more is found. An input:
//
//   | kind of matrix, rows, k, options | codes and scales, repeated as often as needed |
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "formats/format.h"
#include "formats/gguf/gguf_types.h"
#include "formats/gguf_blocks.h"
#include "formats/gguf_formats.h"
#include "formats/panel.h"
#include "moe/routing.h"

namespace {

using kt::Format;

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  int below(int end) {
    const int high = next();
    return (high * 256 + next()) % end;
  }
  uint8_t next() { return at_ < size_ ? data_[at_++] : 0; }

  // Exactly so many bytes, from what is left of the input.
  std::unique_ptr<uint8_t[]> bytes(size_t count) {
    auto result = std::make_unique<uint8_t[]>(count);
    const size_t left = size_ - at_;
    for (size_t i = 0; i < count && left > 0; ++i) result[i] = data_[at_ + i % left];
    return result;
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
};

std::vector<const Format*> formats() {
  std::vector<const Format*> all = kt::all_formats();
  for (const Format* format : kt::gguf_panel_formats()) all.push_back(format);
  for (const Format& format : kt::block_formats()) all.push_back(&format);
  return all;
}

size_t stored_scale_bytes(kt::ScaleType type, kt::DType dtype) {
  if (type == kt::ScaleType::kE8m0 || type == kt::ScaleType::kE4m3) return 1;
  return dtype == kt::DType::kF32 ? 4 : 2;
}

size_t stored_scales(const Format& format, const kt::PanelLayout& layout, kt::MatrixShape shape, kt::DType dtype) {
  if (!format.scales_apart()) return 0;
  const size_t rows = (shape.rows + format.rows_per_scale - 1) / format.rows_per_scale;
  const size_t groups = (shape.k + layout.group_k - 1) / layout.group_k;
  return rows * groups * stored_scale_bytes(layout.scale_type, dtype);
}

void fuzz_panels(Input& input) {
  static const std::vector<const Format*> all = formats();
  const Format& format = *all[input.below(static_cast<int>(all.size()))];
  const int word = format.blocks != nullptr ? format.blocks->columns : std::max(1, format.columns_per_word);
  const kt::MatrixShape shape = {1 + input.below(70),
                                 word * (1 + input.below(6)) * (input.below(2) ? 32 / std::min(32, word) : 1)};
  kt::FormatOptions options;
  options.group_size = 16 << input.below(5);
  options.scale_dtype = static_cast<kt::DType>(input.below(3));
  const kt::PanelLayout layout = kt::panel_layout(format, shape, options);
  const kt::MatrixPart whole = {0, shape.rows, 0, shape.k};
  const size_t code_bytes =
      format.blocks != nullptr ? shape.rows * format.blocks->row_bytes(shape.k) : kt::written_code_bytes(format, whole);
  const auto codes = input.bytes(code_bytes);
  const auto scales = input.bytes(stored_scales(format, layout, shape, options.scale_dtype));
  const kt::MatrixSource source = {codes.get(), scales.get(), 1};
  const auto written_codes = std::make_unique<uint8_t[]>(kt::written_code_bytes(format, whole));
  const auto written_scales = std::make_unique<uint8_t[]>(kt::written_scale_bytes(format, layout, whole));
  const int row_length = format.order == kt::Order::kTransposed ? shape.rows : 0;
  const kt::MatrixTarget target = {written_codes.get(), written_scales.get(), row_length};
  double sum = 0;
  for (int index = 0; index * kt::kPanelRows < shape.rows; ++index) {
    const auto panel = std::unique_ptr<uint8_t, decltype(&free)>(
        static_cast<uint8_t*>(std::aligned_alloc(64, (layout.panel_bytes + 63) / 64 * 64)), &free);
    kt::pack_panel(format, layout, options, source, shape, index, panel.get());
    for (int column = 0; column < shape.k; column += 7) {
      sum += kt::element(format, layout, panel.get(), (index + column) % kt::kPanelRows, column);
    }
    kt::unpack_panel(format, layout, panel.get(), index, whole, target);
  }
  volatile double kept = sum;
  (void)kept;
}

void fuzz_routing(Input& input) {
  const int tokens = input.below(40), top_k = 1 + input.below(8), experts = 1 + input.below(300);
  const auto type = input.below(2) ? kt::IdType::kInt64 : kt::IdType::kInt32;
  const size_t entries = static_cast<size_t>(tokens) * top_k;
  const bool masked = input.below(2) != 0;
  auto ids = input.bytes(entries * (type == kt::IdType::kInt64 ? 8 : 4));
  for (size_t i = 0; i < entries && input.below(8) != 0; ++i) {  // mostly ids that there are
    const int64_t id = input.below(experts + 1) - 1;
    if (type == kt::IdType::kInt64) {
      std::memcpy(ids.get() + 8 * i, &id, 8);
    } else {
      const int32_t narrow = static_cast<int32_t>(id);
      std::memcpy(ids.get() + 4 * i, &narrow, 4);
    }
  }
  const auto mask = input.bytes(experts);
  const std::vector<float> weights(entries, 0.5f);
  kt::Routing routing;
  const kt::RoutingInput call = {tokens, top_k, ids.get(), type, weights.data()};
  try {
    routing.group(call, experts, masked ? mask.get() : nullptr);
  } catch (const std::invalid_argument&) {
    if (routing.pairs() != 0) __builtin_trap();
    return;
  }
  int pairs = 0;
  for (const kt::ActiveExpert& active : routing.experts()) {
    if (active.expert < 0 || active.expert >= experts || active.first_pair != pairs) __builtin_trap();
    pairs += active.pairs;
  }
  if (pairs != routing.pairs()) __builtin_trap();
  for (const int32_t token : routing.token_of_pair()) {
    if (token < 0 || token >= tokens) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  try {
    input.below(4) == 0 ? fuzz_routing(input) : fuzz_panels(input);
  } catch (const std::invalid_argument&) {
    // a sentence for whoever loads such a file
  }
  return 0;
}
