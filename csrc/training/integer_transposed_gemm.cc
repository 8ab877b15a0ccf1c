#include "training/integer_transposed_gemm.h"

#include "formats/integers.h"
#include "formats/panel_scales.h"

namespace kt {
namespace {

// Panels of a strip, which with the rows and their products stay in L2.
constexpr size_t kStripBytes = size_t{320} << 10;

int round_up(int count) { return (count + kLargestInt8StepK - 1) / kLargestInt8StepK * kLargestInt8StepK; }

int rows_padded(const LayerShape& shape, Projection which) {
  return which == Projection::kDown ? shape.hidden_padded() : shape.intermediate_padded();
}

PanelLayout layout_of(const LayerShape& shape, const std::vector<Projection>& stack) {
  int depth = 0;
  for (const Projection which : stack) depth += round_up(rows_padded(shape, which));
  return panel_layout(kFormatAmxInt8, {kPanelRows, depth}, {});
}

}  // namespace

bool IntegerTransposedGemm::serves(const ExpertWeights& weights, Projection which) {
  const PanelLayout& layout = weights.layout(which);
  const CodeType codes = weights.format(which).codes;
  const bool one_scale = layout.scale_type == ScaleType::kF32 || layout.scale_type == ScaleType::kBf16 ||
                         layout.scale_type == ScaleType::kF16;
  return one_scale && layout.group_k >= layout.k_padded && (codes == CodeType::kInt8 || codes == CodeType::kCode4);
}

IntegerTransposedGemm::IntegerTransposedGemm(const ExpertWeights& weights, std::vector<Projection> stack)
    : weights_(weights),
      stack_(std::move(stack)),
      kernels_(*served(Operation::kForward, kFormatAmxInt8, Activations::kInt8).kernels),
      layout_(layout_of(weights.shape(), stack_)),
      gemm_(kernels_, layout_),
      strip_panels_(std::clamp(static_cast<int>(kStripBytes / layout_.panel_bytes) / 2 * 2, 2,
                               TransposedGemm::kMostStripPanels)) {}

int IntegerTransposedGemm::rows_of(size_t index) const { return rows_padded(weights_.shape(), stack_[index]); }

int IntegerTransposedGemm::begin_of(size_t index) const {
  int begin = 0;
  for (size_t i = 0; i < index; ++i) begin += round_up(rows_of(i));
  return begin;
}

void IntegerTransposedGemm::scales(int expert, size_t index, int first, int count, float* to) const {
  const PanelLayout& layout = weights_.layout(stack_[index]);
  for (int row = first; row < first + count; row += kPanelRows, to += kPanelRows) {
    const uint8_t* const panel = panel_of(weights_, stack_[index], expert, row / kPanelRows);
    for (int r = 0; r < kPanelRows; ++r) {
      to[r] = static_cast<float>(scale_value(layout, panel, r, 0)) * layout.integer_factor;
    }
  }
}

void IntegerTransposedGemm::prepare(const float* a, const float* scales, size_t index, int first, int count,
                                    float* room, uint8_t* row) const {
  for (int i = 0; i < count; ++i) room[i] = a[i] * scales[i];
  const int padded = round_up(count);
  std::fill(room + count, room + padded, 0.0f);
  const int begin = begin_of(index) + first;
  const RowFormat& format = gemm_.row_format();
  PanelLayout part = layout_;
  part.k_padded = padded;
  kernels_.prepare_row(
      {&part, room, row + format.elements(begin), row + format.elements(layout_.k_padded) + format.groups(begin)});
}

void IntegerTransposedGemm::reserve(WorkerScratch& scratch, int rows, int node) const {
  gemm_.reserve(scratch, rows, size_t{1} * strip_panels_ * kPanelRows, node);
  scratch.decoded.reserve(strip_panels_ * layout_.panel_bytes, node);
}

void IntegerTransposedGemm::transpose(int expert, const Strip& strip, uint8_t* to) const {
  for (size_t index = 0; index < stack_.size(); ++index) {
    const PanelLayout& layout = weights_.layout(stack_[index]);
    const TransposeCodesFn turn =
        weights_.format(stack_[index]).codes == CodeType::kInt8 ? kTransposeCodes.int8 : kTransposeCodes.code4;
    uint8_t* out = to + begin_of(index) * kPanelRows;
    const int panels = rows_of(index) / kPanelRows;
    const auto at = [&](int p) {
      return panel_of(weights_, stack_[index], expert, std::min(p, panels - 1)) + strip.first * layout.bytes_per_32k;
    };
    for (int p = 0; p < panels; ++p, out += kTransposedTileBytes) {
      // Fetched ahead: a strip of a panel is a few KiB far from the next. (Zen 4, 1 thread, shape S, AMXINT8, rank 8,
      // 2026-11-30, CPU time of forward and backward, machine busy, 128 / 1024 tokens: 218 / 703 ms, without 227 /
      // 724.)
      const uint8_t* const from = at(p);
      const uint8_t* const next = at(p + 1);
      for (int k = 0; k < strip.panels; ++k) {
        const size_t tile = k * layout.bytes_per_32k;
        for (size_t line = 0; line < layout.bytes_per_32k; line += 64) __builtin_prefetch(next + tile + line);
        turn(layout, from + tile, out + k * layout_.panel_bytes);
      }
    }
  }
  const PanelHeader header{1.0f, 0};
  for (int k = 0; k < strip.panels; ++k) {
    uint8_t* const at = to + k * layout_.panel_bytes + layout_.header_offset;
    std::memcpy(at, &header, sizeof(header));
    std::fill_n(reinterpret_cast<float*>(at + kPanelHeaderBytes), kPanelRows, 1.0f);
  }
}

}  // namespace kt
