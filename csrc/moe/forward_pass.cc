#include "moe/forward_pass.h"

#include <algorithm>
#include <cstring>

namespace kt {
namespace {

// A piece of gate/up for few tokens: as many gate+up panel pairs as make about this many bytes, long enough a stream
// and fine enough to share evenly. For many tokens kPairsForMany, so that gathering the activations costs little
// (Xeon 6 with AMX, 2 threads, 2026-11-21, BF16, 1024 tokens, shapes S / L of bench/: eight pairs 73 / 344 ms, four
// 76 / 342 ms, sixteen 74 / 370 ms, before the block sizes of kernel_set.h were chosen).
constexpr size_t kPieceBytes = size_t{256} << 10;
constexpr int kManyTokens = 32;
constexpr int kPairsForMany = 8;

// A strip of hidden columns keeps one fp32 sum per token: at most this many bytes of sums for many tokens. For few
// tokens it is kFewPanels wide: the last strips are what threads wait for.
constexpr size_t kSumBytes = size_t{1} << 20;
constexpr int kMaxStripPanels = 8;

// Pieces of the phases between are some rows each: so many pieces a thread even out delays.
constexpr int kRowPiecesPerThread = 8;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Adds each row of weights' bias, if there are any. Plain code for every CPU: a pair's additions are a few thousandths
// of its multiplications.
void add_bias(const ProductPanels& product, const float* bias) {
  if (bias == nullptr) return;
  for (int r = 0; r < product.rows; ++r) {
    for (int p = 0; p < product.panels; ++p) {
      float* const sums = product.first + r * product.stride + p * product.distance;
      for (int i = 0; i < kPanelRows; ++i) sums[i] += bias[p * kPanelRows + i];
    }
  }
}

// Rows cut into at most kRowPiecesPerThread pieces a thread.
struct RowPieces {
  RowPieces(int row_count, int threads) : rows(row_count), per_piece(ceil_div(rows, kRowPiecesPerThread * threads)) {}
  int count() const { return rows == 0 ? 0 : ceil_div(rows, per_piece); }
  int begin(int piece) const { return piece * per_piece; }
  int end(int piece) const { return std::min(rows, (piece + 1) * per_piece); }
  int rows;
  int per_piece;
};

}  // namespace

ForwardPass::ForwardPass(Engine& engine, PassBuffers& buffers, const LayerConfig& config, const ExpertWeights& weights,
                         const PerProjection<const KernelSet*>& kernels, const Routing& routing,
                         const ForwardArgs& args, PassAdditions* additions)
    : engine_(engine),
      buffers_(buffers),
      config_(config),
      weights_(weights),
      routing_(routing),
      args_(args),
      additions_(additions),
      gate_(weights, *kernels[Projection::kGate], Projection::kGate),
      up_(weights, *kernels[Projection::kUp], Projection::kUp),
      down_(weights, *kernels[Projection::kDown], Projection::kDown) {
  plan_hidden(gate_, buffers_.hidden);
  if (weights.paired()) {
    up_.rows = gate_.rows;
  } else {
    plan_hidden(up_, buffers_.hidden_of_up);
  }
  plan_intermediate();
  plan_pieces();
  reserve_scratch();
}

int ForwardPass::pairs_per_piece(const ActiveExpert& expert) const {
  if (expert.pairs >= kManyTokens) return kPairsForMany;
  constexpr int kFewPairs = kFewPanels / 2;
  const int stream = static_cast<int>(kPieceBytes / (gate_.layout.panel_bytes + up_.layout.panel_bytes));
  return std::max(kFewPairs, stream / kFewPairs * kFewPairs);
}

void ForwardPass::plan_hidden(Operand& operand, Buffer& buffer) {
  const LayerShape& shape = config_.shape;
  const bool as_they_are = args_.hidden_type == DType::kBf16 && operand.kernels.activation == Activation::kBf16 &&
                           shape.hidden == shape.hidden_padded();
  if (as_they_are) {
    operand.rows = {static_cast<const uint8_t*>(args_.hidden), size_t{2} * shape.hidden, 0};
    return;
  }
  const RowFormat& rows = operand.gemm.row_format();
  const size_t stride = rows.stride(shape.hidden_padded());
  buffer.reserve(args_.routing.tokens * stride);
  operand.rows = {buffer.data(), stride, rows.elements(shape.hidden_padded())};
}

void ForwardPass::plan_intermediate() {
  const int columns = config_.shape.intermediate_padded();
  swiglu_stride_ = RowFormat(down_.kernels.rows->activation, down_.layout).stride(columns);
  buffers_.intermediate.reserve(routing_.pairs() * swiglu_stride_);
  if (!down_.prepares()) {
    down_.rows = {buffers_.intermediate.data(), swiglu_stride_, 0};
    return;
  }
  const RowFormat& rows = down_.gemm.row_format();
  buffers_.prepared.reserve(routing_.pairs() * rows.stride(columns));
  down_.rows = {buffers_.prepared.data(), rows.stride(columns), rows.elements(columns)};
}

void ForwardPass::plan_pieces() {
  for (int s = 0; s < engine_.pools().subpools(); ++s) {
    const size_t panel_sums = static_cast<size_t>(args_.routing.tokens) * kPanelRows * sizeof(float);
    const int panels = weights_.panels(Projection::kDown, s).count();
    const int threads = engine_.pools().threads_in(s);
    const int even_share = std::max(1, panels / (4 * threads));  // four strips a thread even out delays
    const int fits = std::max(2, static_cast<int>(kSumBytes / panel_sums));
    const int most = args_.routing.tokens < kManyTokens ? kFewPanels : kMaxStripPanels;
    const int per_strip = std::min({most, even_share, fits});
    const auto pieces_of = [&](const ActiveExpert& expert) {
      return ceil_div(weights_.panels(Projection::kGate, s).count(), pairs_per_piece(expert));
    };
    subpools_.push_back({ExpertPieces(routing_.experts(), pieces_of), per_strip});
    gate_up_pieces_.push_back(subpools_.back().gate_up.count());
    down_strips_.push_back(ceil_div(panels, per_strip));
  }
}

// Everything the workers need is reserved before they start, on their own node. Workers may compute pieces of every
// sub-pool.
void ForwardPass::reserve_scratch() {
  const ThreadPools& pools = engine_.pools();
  int panels_per_strip = 0;
  for (const SubpoolPlan& plan : subpools_) panels_per_strip = std::max(panels_per_strip, plan.panels_per_strip);
  for (int worker = 0; worker < pools.threads(); ++worker) {
    reserve_scratch(engine_.scratch(worker), panels_per_strip, pools.node_of(pools.subpool_of(worker)));
  }
}

void ForwardPass::reserve_scratch(WorkerScratch& scratch, int panels_per_strip, int node) {
  const size_t strip_columns = static_cast<size_t>(panels_per_strip) * kPanelRows;
  for (const ActiveExpert& expert : routing_.experts()) {
    const size_t pair_columns = size_t{2} * pairs_per_piece(expert) * kPanelRows;
    gate_.gemm.reserve(scratch, expert.pairs, pair_columns, node);
    up_.gemm.reserve(scratch, expert.pairs, pair_columns, node);
    if (!weights_.paired()) scratch.gate.reserve(expert.pairs * pair_columns / 2 * sizeof(float), node);
    down_.gemm.reserve(scratch, expert.pairs, strip_columns, node);
  }
  scratch.sum.reserve(args_.routing.tokens * strip_columns * sizeof(float), node);
  if (gate_.prepares() || up_.prepares()) scratch.row.reserve(config_.shape.hidden_padded() * sizeof(float), node);
}

void ForwardPass::run() {
  ThreadPools& pools = engine_.pools();
  const RowPieces tokens(converts_hidden() ? args_.routing.tokens : 0, pools.threads());
  const RowPieces pairs(down_.prepares() ? routing_.pairs() : 0, pools.threads());
  const auto hidden = [&](const Worker& worker, int piece) {
    for (int t = tokens.begin(piece); t < tokens.end(piece); ++t) {
      prepare_hidden(worker, gate_, buffers_.hidden, t);
      if (!weights_.paired()) prepare_hidden(worker, up_, buffers_.hidden_of_up, t);
    }
  };
  const auto products = [&](const Worker& worker, int subpool, int piece) { gate_up(worker, subpool, piece); };
  const auto intermediate = [&](const Worker&, int piece) {
    for (int p = pairs.begin(piece); p < pairs.end(piece); ++p) prepare_intermediate(p);
  };
  const auto strips = [&](const Worker& worker, int subpool, int strip) { down(worker, subpool, strip); };
  const auto before_gate_up = [&](const Worker& worker, int piece) { additions_->before_gate_up(worker, piece); };
  const IntermediateRows swiglu_rows = {buffers_.intermediate.data(), swiglu_stride_, *down_.kernels.rows};
  const auto before_down = [&](const Worker& worker, int piece) {
    additions_->before_down(worker, piece, swiglu_rows);
  };
  pools.run({Phase::of(additions_ == nullptr ? 0 : additions_->pieces_before_gate_up(), before_gate_up),
             Phase::of(tokens.count(), hidden), Phase::in_subpools(gate_up_pieces_, products),
             Phase::of(additions_ == nullptr ? 0 : additions_->pieces_before_down(), before_down),
             Phase::of(pairs.count(), intermediate), Phase::in_subpools(down_strips_, strips)},
            args_.caller);
}

void ForwardPass::prepare_hidden(const Worker& worker, const Operand& operand, const Buffer& buffer, int token) {
  if (operand.rows.data == args_.hidden) return;
  const int hidden = config_.shape.hidden, padding = config_.shape.hidden_padded() - hidden;
  const size_t in_bytes = args_.hidden_type == DType::kF32 ? 4 : 2;
  const ConvertFn convert = operand.kernels.rows->load_rows[static_cast<int>(args_.hidden_type)];
  uint8_t* const out = buffer.data() + token * operand.rows.stride;
  uint8_t* const converted = operand.prepares() ? engine_.scratch(worker.index).row.data() : out;
  convert(static_cast<const uint8_t*>(args_.hidden) + token * in_bytes * hidden, converted, hidden);
  std::memset(converted + hidden * operand.element(), 0, padding * operand.element());
  if (!operand.prepares()) return;
  operand.kernels.prepare_row(
      {&operand.layout, reinterpret_cast<const float*>(converted), out, out + operand.rows.groups_at});
}

// Pieces are taken in ascending order, so this worker's next one is likely as many further as its sub-pool has threads:
// its weights are fetched meanwhile.
void ForwardPass::gate_up(const Worker& worker, int subpool, int piece) {
  const int likely_next = std::min(piece + engine_.pools().threads_in(subpool), gate_up_pieces_[subpool] - 1);
  const auto multiply = weights_.paired() ? &ForwardPass::multiply_paired : &ForwardPass::multiply_apart;
  (this->*multiply)(worker, gate_up_piece(subpool, piece), gate_up_piece(subpool, likely_next));
}

ForwardPass::GateUpPiece ForwardPass::gate_up_piece(int subpool, int piece) const {
  const auto [expert, index] = subpools_[subpool].gate_up.at(piece);
  const int first_pair = index * pairs_per_piece(*expert);
  const int pairs = weights_.panels(Projection::kGate, subpool).count() - first_pair;
  return {subpool, expert, first_pair, std::min(pairs_per_piece(*expert), pairs)};
}

// gate and up panels alternate, in memory and so in the product.
void ForwardPass::multiply_paired(const Worker& worker, const GateUpPiece& piece, const GateUpPiece& next) {
  const ActiveExpert& expert = *piece.expert;
  const auto panels_of = [&](const GateUpPiece& p) {
    return weights_.panel(Projection::kGate, p.subpool, p.expert->expert, p.first_pair);
  };
  const auto epilogue = [&](float* product, size_t stride, int first_row, int row_count) {
    const size_t distance = 2 * kPanelRows;
    const ProductPanels gate = {product, stride, distance, piece.pairs, row_count};
    const ProductPanels up = {product + kPanelRows, stride, distance, piece.pairs, row_count};
    add_bias(gate, bias_of(piece, Projection::kGate));
    add_bias(up, bias_of(piece, Projection::kUp));
    swiglu(piece, gate, up, first_row);
  };
  gate_.gemm.multiply(engine_.scratch(worker.index), {panels_of(piece), 2 * piece.pairs, panels_of(next)},
                      {gate_.rows, routing_.token_of_pair().data() + expert.first_pair, 0, expert.pairs}, epilogue);
}

void ForwardPass::multiply_apart(const Worker& worker, const GateUpPiece& piece, const GateUpPiece& next) {
  const ActiveExpert& expert = *piece.expert;
  WorkerScratch& scratch = engine_.scratch(worker.index);
  const auto multiply = [&](const Operand& operand, Projection which, auto epilogue) {
    const auto panels_of = [&](const GateUpPiece& p) {
      return weights_.panel(which, p.subpool, p.expert->expert, p.first_pair);
    };
    operand.gemm.multiply(scratch, {panels_of(piece), piece.pairs, panels_of(next)},
                          {operand.rows, routing_.token_of_pair().data() + expert.first_pair, 0, expert.pairs},
                          epilogue);
  };
  const size_t columns = static_cast<size_t>(piece.pairs) * kPanelRows;
  float* const gates = scratch.gate.as<float>();
  multiply(gate_, Projection::kGate, [&](float* product, size_t stride, int first_row, int row_count) {
    add_bias({product, stride, kPanelRows, piece.pairs, row_count}, bias_of(piece, Projection::kGate));
    for (int r = 0; r < row_count; ++r) {
      std::copy_n(product + r * stride, columns, gates + (first_row + r) * columns);
    }
  });
  multiply(up_, Projection::kUp, [&](float* product, size_t stride, int first_row, int row_count) {
    const ProductPanels up = {product, stride, kPanelRows, piece.pairs, row_count};
    add_bias(up, bias_of(piece, Projection::kUp));
    swiglu(piece, {gates + first_row * columns, columns, kPanelRows, piece.pairs, row_count}, up, first_row);
  });
}

const float* ForwardPass::bias_of(const GateUpPiece& piece, Projection which) const {
  const int begin = weights_.panels(which, piece.subpool).begin;
  return weights_.bias(which, piece.expert->expert, begin + piece.first_pair);
}

// Columns of the piece's pairs, of `gate.rows` rows of the expert from `first_row` on. Both have the same distance.
void ForwardPass::swiglu(const GateUpPiece& piece, const ProductPanels& gate, const ProductPanels& up,
                         int first_row) const {
  const int column = (weights_.panels(Projection::kGate, piece.subpool).begin + piece.first_pair) * kPanelRows;
  const int first_pair = piece.expert->first_pair + first_row;
  if (additions_ != nullptr) additions_->gate_up({*piece.expert, first_pair, column}, gate, up);
  uint8_t* const h = buffers_.intermediate.data() + first_pair * swiglu_stride_;
  down_.kernels.rows->swiglu({gate.first, gate.stride, up.first, up.stride, gate.distance, gate.rows, piece.pairs,
                              h + column * down_.element(), swiglu_stride_ / down_.element(), config_.swiglu_limit,
                              config_.swiglu_alpha});
}

void ForwardPass::prepare_intermediate(int pair) {
  const uint8_t* from = buffers_.intermediate.data() + pair * swiglu_stride_;
  uint8_t* const out = buffers_.prepared.data() + pair * down_.rows.stride;
  down_.kernels.prepare_row({&down_.layout, reinterpret_cast<const float*>(from), out, out + down_.rows.groups_at});
}

void ForwardPass::down(const Worker& worker, int subpool, int strip) {
  const int panels_per_strip = subpools_[subpool].panels_per_strip;
  const PanelRange share = weights_.panels(Projection::kDown, subpool);
  const int first_panel = strip * panels_per_strip;
  const int panels = std::min(panels_per_strip, share.count() - first_panel);
  const int columns = panels * kPanelRows;
  const int following = (strip + engine_.pools().threads_in(subpool)) * panels_per_strip;

  WorkerScratch& scratch = engine_.scratch(worker.index);
  const size_t sum_bytes = static_cast<size_t>(args_.routing.tokens) * columns * sizeof(float);
  float* sum = scratch.sum.as<float>();
  std::memset(sum, 0, sum_bytes);

  const std::vector<ActiveExpert>& experts = routing_.experts();
  const auto panels_at = [&](const ActiveExpert& expert, int panel) {
    return weights_.panel(Projection::kDown, subpool, expert.expert, panel);
  };
  for (size_t i = 0; i < experts.size(); ++i) {
    const ActiveExpert& expert = experts[i];
    const uint8_t* next = i + 1 < experts.size() ? panels_at(experts[i + 1], first_panel)
                                                 : panels_at(experts[0], std::min(following, share.count() - 1));
    const float* bias = weights_.bias(Projection::kDown, expert.expert, share.begin + first_panel);
    const auto add = [&](float* product, size_t stride, int first_row, int row_count) {
      const int pair = expert.first_pair + first_row;
      const ProductPanels sums = {product, stride, kPanelRows, panels, row_count};
      add_bias(sums, bias);
      if (additions_ != nullptr) additions_->down({expert, pair, (share.begin + first_panel) * kPanelRows}, sums);
      down_.kernels.rows->weighted_sum({product, stride, row_count, columns, routing_.token_of_pair().data() + pair,
                                        routing_.weight_of_pair().data() + pair, sum, static_cast<size_t>(columns)});
    };
    down_.gemm.multiply(scratch, {panels_at(expert, first_panel), panels, next},
                        {down_.rows, nullptr, expert.first_pair, expert.pairs}, add);
  }
  store_strip(sum, columns, (share.begin + first_panel) * kPanelRows, columns);
}

void ForwardPass::store_strip(const float* sum, size_t sum_stride, int first_column, int columns) const {
  const int hidden = config_.shape.hidden;
  const int live = std::min(columns, hidden - first_column);
  const size_t out_bytes = args_.output_type == DType::kF32 ? 4 : 2;
  const ConvertFn store = down_.kernels.rows->store_rows[static_cast<int>(args_.output_type)];
  const ConvertFn widen = down_.kernels.rows->widen_rows[static_cast<int>(args_.output_type)];
  alignas(64) float row[kMaxStripPanels * kPanelRows];
  for (int t = 0; t < args_.routing.tokens; ++t) {
    uint8_t* out = static_cast<uint8_t*>(args_.output) + (static_cast<size_t>(t) * hidden + first_column) * out_bytes;
    const float* from = sum + t * sum_stride;
    if (args_.store == Store::kAccumulate) {
      widen(out, row, live);
      for (int i = 0; i < live; ++i) row[i] += from[i];
      from = row;
    }
    store(from, out, live);
  }
}

}  // namespace kt
