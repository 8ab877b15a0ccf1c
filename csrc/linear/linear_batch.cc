#include "linear/linear_batch.h"

#include <algorithm>

namespace kt {

Linear::BatchPass::BatchPass(const Linear& linear, const MatrixBatch& x, const MatrixBatch& out)
    : part_(linear.parts_[0]),
      engine_(linear.engine()),
      x_(x),
      out_(out),
      kernels_(*part_.served.kernels),
      gemm_(kernels_, part_.layout),
      panels_per_matrix_(ceil_div(static_cast<int>(out.first.columns), kPanelRows)),
      panels_per_piece_(
          std::min(panels_per_matrix_, panels_per_piece(panels_per_matrix_ * out.count, part_.layout.panel_bytes,
                                                        x.first.rows, engine_.pools().threads()))),
      pieces_per_matrix_(ceil_div(panels_per_matrix_, panels_per_piece_)) {
  const int k = part_.layout.k_padded;
  if (!serve_unconverted(x.first, kernels_, part_.layout) || x.step_bytes % 64 != 0) {
    std::deque<Buffer>& buffers = engine_.pass_buffers().linear;
    if (buffers.empty()) buffers.emplace_back();
    const RowFormat& format = gemm_.row_format();
    buffers[0].reserve(x.count * x.first.rows * format.stride(k));
    converted_ = {buffers[0].data(), format.stride(k), format.elements(k)};
  }
  reserve();
}

void Linear::BatchPass::reserve() {
  const ThreadPools& pools = engine_.pools();
  for (int worker = 0; worker < pools.threads(); ++worker) {
    const int node = pools.node_of(pools.subpool_of(worker));
    gemm_.reserve(engine_.scratch(worker), static_cast<int>(x_.first.rows), panels_per_piece_ * kPanelRows, node);
    if (kernels_.prepare_row != nullptr) {
      engine_.scratch(worker).row.reserve(part_.layout.k_padded * sizeof(float), node);
    }
  }
}

// A sub-pool has pieces of every matrix of which it holds panels.
void Linear::BatchPass::run() {
  ThreadPools& pools = engine_.pools();
  const auto convert_piece = [&](const Worker& worker, int piece) {
    const int rows = x_.count * static_cast<int>(x_.first.rows);
    convert(worker, piece * kTokensPerConversion, std::min(rows, (piece + 1) * kTokensPerConversion));
  };
  const auto multiply_piece = [&](const Worker& worker, int subpool, int piece) { multiply(worker, subpool, piece); };
  std::vector<int> pieces(pools.subpools());
  for (size_t s = 0; s < pieces.size(); ++s) {
    const PanelRange& share = part_.panels[s];
    if (share.count() == 0) continue;
    const int matrices = (share.end - 1) / panels_per_matrix_ - share.begin / panels_per_matrix_ + 1;
    pieces[s] = matrices * pieces_per_matrix_;
  }
  const int conversions =
      converted_.data == nullptr ? 0 : ceil_div(x_.count * static_cast<int>(x_.first.rows), kTokensPerConversion);
  pools.run({Phase::of(conversions, convert_piece), Phase::in_subpools(pieces, multiply_piece)});
}

// Rows [first, last) of all matrices' tokens.
void Linear::BatchPass::convert(const Worker& worker, int first, int last) {
  const ConvertFn load = kernels_.rows->load_rows[static_cast<int>(row_dtype(x_.first.type))];
  const RowConversion convert{kernels_, part_.layout, load, static_cast<int>(x_.first.columns), converted_.groups_at};
  const int tokens = static_cast<int>(x_.first.rows);
  uint8_t* const to = engine_.pass_buffers().linear[0].data();
  for (int row = first; row < last; ++row) {
    convert(x_.at(row / tokens).row(row % tokens), engine_.scratch(worker.index).row.data(),
            to + row * converted_.stride);
  }
}

RowTable Linear::BatchPass::rows_of(int index) const {
  if (converted_.data == nullptr) return {x_.at(index).data, static_cast<size_t>(x_.first.row_bytes), 0};
  RowTable rows = converted_;
  rows.data += index * x_.first.rows * converted_.stride;
  return rows;
}

void Linear::BatchPass::multiply(const Worker& worker, int subpool, int piece) {
  const PanelRange& share = part_.panels[subpool];
  const int matrix = share.begin / panels_per_matrix_ + piece / pieces_per_matrix_;
  const int at = piece % pieces_per_matrix_ * panels_per_piece_;
  const int first_of_matrix = matrix * panels_per_matrix_;
  const int first = std::max(share.begin, first_of_matrix + at);
  const int end = std::min(share.end, first_of_matrix + std::min(panels_per_matrix_, at + panels_per_piece_));
  if (first >= end) return;
  const auto panel = [&](int index) {
    return part_.memory[subpool].data() + (index - share.begin) * part_.layout.panel_bytes;
  };
  // What a worker takes next is as many pieces on as there are workers.
  const int following = first + engine_.pools().threads_in(subpool) * panels_per_piece_;
  const int column = (first - first_of_matrix) * kPanelRows;
  const int columns = std::min(static_cast<int>(out_.first.columns) - column, (end - first) * kPanelRows);
  const MatrixView out = out_.at(matrix);
  const ConvertFn store = kernels_.rows->store_rows[static_cast<int>(row_dtype(out.type))];
  const RowTable rows = rows_of(matrix);
  gemm_.multiply(engine_.scratch(worker.index),
                 {panel(first), end - first, panel(following < share.end ? following : first)},
                 {rows, nullptr, 0, static_cast<int>(x_.first.rows)},
                 [&](const float* product, size_t stride, int first_token, int tokens) {
                   for (int t = 0; t < tokens; ++t) {
                     store(product + t * stride, out.row(first_token + t) + column * bytes_of(out.type), columns);
                   }
                 });
}

}  // namespace kt
