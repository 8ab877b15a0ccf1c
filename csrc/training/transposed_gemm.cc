#include "training/transposed_gemm.h"

#include <stdexcept>

#include "formats/bf16.h"
#include "kernels/tiers.h"

namespace kt {
namespace {

constexpr size_t kChunkBytes = 2 * kPanelRows * sizeof(uint16_t);          // two rows or columns
constexpr size_t kTileBytes = kPanelRows * kPanelRows * sizeof(uint16_t);  // a panel's 32 columns

const DecodeKernels& decode_kernels() {
  return first_active<DecodeKernels>({{kAvx512Features, &kDecodeAvx512}, {kAvx2Features, &kDecodeAvx2}});
}

PanelLayout block_layout(int rows) { return panel_layout(kFormatBf16, {kPanelRows, std::max(rows, kPanelK)}, {}); }

// Two rows of 32 numbers side by side: a chunk of the transposed panel.
void interleave(const uint16_t* even, const uint16_t* odd, uint8_t* to) {
  uint16_t* const out = reinterpret_cast<uint16_t*>(to);
  for (int k = 0; k < kPanelRows; ++k) {
    out[2 * k] = even[k];
    out[2 * k + 1] = odd[k];
  }
}

}  // namespace

TransposedGemm::TransposedGemm(const ExpertWeights& weights, Projection which)
    : weights_(weights),
      which_(which),
      kernels_(*served(Operation::kForward, kFormatBf16, Activations::kAuto).kernels),
      decoders_(decode_kernels()),
      panels_(which == Projection::kDown ? weights.shape().hidden_panels() : weights.shape().intermediate_panels()),
      layout_(block_layout(kBlockRows)),
      remainder_(block_layout(panels_ * kPanelRows % kBlockRows)) {}

bool TransposedGemm::unpacks() const { return weights_.format(which_).blocks != nullptr; }

void TransposedGemm::reserve(WorkerScratch& scratch, int rows, int node) const {
  for (const PanelLayout* layout : {&layout_, &remainder_}) {
    GroupedGemm(kernels_, *layout).reserve(scratch, rows, kMostStripPanels * kPanelRows, node);
  }
  scratch.decoded.reserve(kMostStripPanels * (layout_.panel_bytes + kTileBytes), node);
}

void TransposedGemm::multiply(WorkerScratch& scratch, int expert, const Strip& strip, const GroupedGemm::Rows& rows,
                              Store store, float* sums) const {
  const size_t columns = strip.columns();
  const size_t element = kernels_.activation == Activation::kBf16 ? 2 : 4;
  for (int first = 0; first < panels_; first += kBlockRows / kPanelRows, store = Store::kAccumulate) {
    const int count = block_panels(first);
    const PanelLayout& layout = count * kPanelRows == kBlockRows ? layout_ : remainder_;
    uint8_t* const panels = scratch.decoded.data() + kMostStripPanels * kTileBytes;
    decode(expert, first, count, strip, scratch, panels);
    const RowTable table = {rows.table.data + size_t{1} * first * kPanelRows * element, rows.table.stride, 0};
    const auto add = [&](const float* product, size_t stride, int first_row, int row_count) {
      for (int r = 0; r < row_count; ++r, product += stride) {
        float* const to = sums + (first_row + r) * columns;
        if (store == Store::kOverwrite) {
          std::copy_n(product, columns, to);
        } else {
          for (size_t c = 0; c < columns; ++c) to[c] += product[c];
        }
      }
    };
    GroupedGemm(kernels_, layout)
        .multiply(scratch, {panels, strip.panels, panels}, {table, rows.index, rows.first, rows.count}, add);
  }
}

const uint8_t* panel_of(const ExpertWeights& weights, Projection which, int expert, int index) {
  int subpool = 0;
  while (index >= weights.panels(which, subpool).end) ++subpool;
  return weights.panel(which, subpool, expert, index - weights.panels(which, subpool).begin);
}

void TransposedGemm::decode(int expert, int first, int count, const Strip& strip, WorkerScratch& scratch,
                            uint8_t* to) const {
  const size_t distance = (count * kPanelRows == kBlockRows ? layout_ : remainder_).panel_bytes;
  for (int p = 0; p < count; ++p) {
    decode_panel(expert, first + p, strip, scratch.decoded.data(), to + p * kTileBytes, distance);
  }
}

// Panel `index` of W becomes 32 columns of each panel of the strip, which stand `distance` bytes apart.
void TransposedGemm::decode_panel(int expert, int index, const Strip& strip, uint8_t* room, uint8_t* to,
                                  size_t distance) const {
  const Format& format = weights_.format(which_);
  const PanelLayout& layout = weights_.layout(which_);
  const uint8_t* const source = panel_of(weights_, which_, expert, index);
  const int first = strip.first * kPanelRows;
  const int columns = strip.columns();
  if (unpacks()) {
    const int live = std::min(
        columns, (which_ == Projection::kDown ? weights_.shape().intermediate : weights_.shape().hidden) - first);
    alignas(64) uint16_t rows[kPanelRows][kMostStripPanels * kPanelRows] = {};
    for (int r = 0; r < kPanelRows; ++r) {
      const MatrixPart part = {index * kPanelRows + r, 1, first, live};
      unpack_panel(format, layout, source, index, part, {reinterpret_cast<uint8_t*>(rows[r]), nullptr, live});
    }
    for (int p = 0; p < strip.panels; ++p) {
      for (int r = 0; r < kPanelRows; r += 2) {
        interleave(rows[r] + p * kPanelRows, rows[r + 1] + p * kPanelRows, to + p * distance + r / 2 * kChunkBytes);
      }
    }
    return;
  }
  const uint8_t* pairs = source + strip.first * kTileBytes;
  if (format.codes != CodeType::kBf16) {
    const auto run = format.codes == CodeType::kE4m3    ? decoders_.e4m3
                     : format.codes == CodeType::kCode4 ? decoders_.code4
                                                        : decoders_.int8;
    run({&layout, source, first, columns, room});
    pairs = room;
  }
  for (int p = 0; p < strip.panels; ++p) decoders_.transpose(pairs + p * kTileBytes, to + p * distance);
  if (layout.scale_type != ScaleType::kNone) spread_nan(source, strip, to, distance);
}

// Rows with a NaN code: kernels decode it as a number.
void TransposedGemm::spread_nan(const uint8_t* panel, const Strip& strip, uint8_t* to, size_t distance) const {
  PanelHeader header;
  std::memcpy(&header, panel + weights_.layout(which_).header_offset, sizeof(header));
  constexpr uint16_t kNan = 0x7FC0;
  for (int r = 0; r < kPanelRows; ++r) {
    if ((header.nan_rows >> r & 1) == 0) continue;
    for (int p = 0; p < strip.panels; ++p) {
      uint16_t* const chunk = reinterpret_cast<uint16_t*>(to + p * distance + r / 2 * kChunkBytes);
      for (int k = 0; k < kPanelRows; ++k) chunk[2 * k + r % 2] = kNan;
    }
  }
}

}  // namespace kt
