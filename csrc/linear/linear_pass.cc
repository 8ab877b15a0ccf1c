#include "linear/linear_pass.h"

#include <algorithm>

#include "linear/activation_rows.h"

namespace kt {
bool Linear::Pass::Operand::serves(const Part& part) const {
  const KernelSet& other = *part.served.kernels;
  return kernels.activation == other.activation && kernels.rows == other.rows &&
         kernels.prepare_row == other.prepare_row && layout.k_padded == part.layout.k_padded &&
         layout.int8_step_k == part.layout.int8_step_k && layout.int8_sum_k == part.layout.int8_sum_k &&
         layout.integer_offset == part.layout.integer_offset;
}

Linear::Pass::Pass(const Linear& linear, const MatrixView& x, const MatrixView& out, const float* bias, int first_row)
    : linear_(linear), engine_(linear.engine()), x_(x), out_(out), bias_(bias), first_row_(first_row) {
  for (const Part& part : linear.parts_) plan(part);
}

const Linear::Pass::Operand& Linear::Pass::operand_for(const Part& part) {
  for (const Operand& operand : operands_) {
    if (operand.serves(part)) return operand;
  }
  Operand& operand = operands_.emplace_back(part);
  const int k = operand.layout.k_padded;
  if (serve_unconverted(x_, operand.kernels, operand.layout)) {
    operand.rows = {x_.data, static_cast<size_t>(x_.row_bytes), 0};
    return operand;
  }
  std::deque<Buffer>& buffers = engine_.pass_buffers().linear;
  if (buffers.size() < operands_.size()) buffers.emplace_back();
  Buffer& buffer = buffers[operands_.size() - 1];
  const RowFormat& format = operand.gemm.row_format();
  buffer.reserve(x_.rows * format.stride(k));
  operand.converted = buffer.data();
  operand.rows = {buffer.data(), format.stride(k), format.elements(k)};
  return operand;
}

void Linear::Pass::plan(const Part& part) {
  const int first = std::max(first_row_, part.first_row) - part.first_row;
  const int last = std::min(first_row_ + static_cast<int>(out_.columns), part.first_row + part.rows) - part.first_row;
  if (first >= last) return;
  Work work{
      &part,
      &operand_for(part),
      GroupedGemm(*part.served.kernels, part.layout),
      {},
      panels_per_piece(ceil_div(part.rows, kPanelRows), part.layout.panel_bytes, x_.rows, engine_.pools().threads())};
  for (const PanelRange& share : part.panels) {
    const int begin = std::max(share.begin, first / kPanelRows);
    work.panels.push_back({begin, std::max(begin, std::min(share.end, ceil_div(last, kPanelRows)))});
  }
  reserve(work);
  work_.push_back(std::move(work));
}

void Linear::Pass::reserve(const Work& work) {
  const ThreadPools& pools = engine_.pools();
  const size_t columns = static_cast<size_t>(work.panels_per_piece) * kPanelRows;
  for (int worker = 0; worker < pools.threads(); ++worker) {
    const int node = pools.node_of(pools.subpool_of(worker));
    work.gemm.reserve(engine_.scratch(worker), static_cast<int>(x_.rows), columns, node);
    if (work.operand->prepares()) {
      engine_.scratch(worker).row.reserve(work.operand->layout.k_padded * sizeof(float), node);
    }
  }
}

void Linear::Pass::run() {
  const int tokens = static_cast<int>(x_.rows);
  std::vector<const Operand*> converted;
  for (const Operand& operand : operands_) {
    if (operand.converted != nullptr) converted.push_back(&operand);
  }
  const int conversions = ceil_div(tokens, kTokensPerConversion);  // of each operand
  const auto convert_piece = [&](const Worker& worker, int piece) {
    const int first = piece % conversions * kTokensPerConversion;
    convert(worker, *converted[piece / conversions], first, std::min(tokens, first + kTokensPerConversion));
  };
  const auto multiply_piece = [&](const Worker& worker, int subpool, int piece) { multiply(worker, subpool, piece); };
  std::vector<int> pieces(engine_.pools().subpools());
  for (const Work& work : work_) {
    for (size_t s = 0; s < pieces.size(); ++s) pieces[s] += ceil_div(work.panels[s].count(), work.panels_per_piece);
  }
  engine_.pools().run({Phase::of(static_cast<int>(converted.size()) * conversions, convert_piece),
                       Phase::in_subpools(pieces, multiply_piece)});
}

void Linear::Pass::convert(const Worker& worker, const Operand& operand, int first, int last) {
  const ConvertFn load = operand.kernels.rows->load_rows[static_cast<int>(row_dtype(x_.type))];
  const RowConversion convert{operand.kernels, operand.layout, load, static_cast<int>(x_.columns),
                              operand.rows.groups_at};
  for (int t = first; t < last; ++t) {
    convert(x_.row(t), engine_.scratch(worker.index).row.data(), operand.converted + t * operand.rows.stride);
  }
}

// Piece `piece` of a sub-pool, counted over all parts.
void Linear::Pass::multiply(const Worker& worker, int subpool, int piece) {
  for (const Work& work : work_) {
    const PanelRange& range = work.panels[subpool];
    const int pieces = ceil_div(range.count(), work.panels_per_piece);
    if (piece >= pieces) {
      piece -= pieces;
      continue;
    }
    const Part& part = *work.part;
    const int first = range.begin + piece * work.panels_per_piece;
    const int count = std::min(work.panels_per_piece, range.end - first);
    const auto panel = [&](int index) {
      return part.memory[subpool].data() + (index - part.panels[subpool].begin) * part.layout.panel_bytes;
    };
    // What a worker takes next is as many pieces on as there are workers.
    const int following = first + engine_.pools().threads_in(subpool) * work.panels_per_piece;
    const uint8_t* next = panel(following < range.end ? following : first);
    work.gemm.multiply(engine_.scratch(worker.index), {panel(first), count, next},
                       {work.operand->rows, nullptr, 0, static_cast<int>(x_.rows)},
                       [&](const float* product, size_t stride, int first_token, int tokens) {
                         store(work, first, count, product, stride, first_token, tokens);
                       });
    return;
  }
}

void Linear::Pass::store(const Work& work, int first_panel, int panels, const float* product, size_t stride,
                         int first_token, int tokens) const {
  const Part& part = *work.part;
  const int row = part.first_row + first_panel * kPanelRows;  // of W
  const int skipped = std::max(0, first_row_ - row);
  const int last =
      std::min({row + panels * kPanelRows, part.first_row + part.rows, first_row_ + static_cast<int>(out_.columns)});
  const int columns = last - row - skipped;
  const ConvertFn convert = work.operand->kernels.rows->store_rows[static_cast<int>(row_dtype(out_.type))];
  const size_t at = (row + skipped - first_row_) * bytes_of(out_.type);
  std::array<float, kMostPanelsPerPiece * kPanelRows> sums;
  for (int t = 0; t < tokens; ++t) {
    const float* from = product + t * stride + skipped;
    if (bias_ != nullptr) {
      const float* const bias = bias_ + row + skipped - first_row_;
      for (int i = 0; i < columns; ++i) sums[i] = from[i] + bias[i];
      from = sums.data();
    }
    convert(from, out_.row(first_token + t) + at, columns);
  }
}

}  // namespace kt
