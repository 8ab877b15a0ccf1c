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

// A strip of hidden columns keeps one fp32 sum per token: at most this many bytes of sums for many tokens.
constexpr size_t kSumBytes = size_t{1} << 20;
constexpr int kMaxStripPanels = 8;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace

ForwardPass::ForwardPass(Engine& engine, PassBuffers& buffers, const KernelSet& kernels, const LayerConfig& config,
                         const ExpertWeights& weights, const Routing& routing, const ForwardArgs& args)
    : engine_(engine),
      buffers_(buffers),
      kernels_(kernels),
      config_(config),
      weights_(weights),
      routing_(routing),
      args_(args),
      gate_up_gemm_(kernels, weights.gate_up_layout()),
      down_gemm_(kernels, weights.down_layout()) {
  plan_rows();
  plan_pieces();
  reserve_scratch();
}

int ForwardPass::pairs_per_piece(const ActiveExpert& expert) const {
  if (expert.pairs >= kManyTokens) return kPairsForMany;
  return std::max(1, static_cast<int>(kPieceBytes / (2 * weights_.gate_up_layout().panel_bytes)));
}

void ForwardPass::plan_rows() {
  const LayerShape& shape = config_.shape;
  converts_hidden_ = args_.hidden_type != DType::kBf16 || kernels_.activation != Activation::kBf16 ||
                     shape.hidden != shape.hidden_padded();
  if (converts_hidden_) {
    const RowFormat& rows = gate_up_gemm_.row_format();
    const size_t stride = rows.stride(shape.hidden_padded());
    buffers_.hidden.reserve(args_.routing.tokens * stride);
    hidden_ = {buffers_.hidden.data(), stride, rows.elements(shape.hidden_padded())};
  } else {
    hidden_ = {static_cast<const uint8_t*>(args_.hidden), size_t{2} * shape.hidden, 0};
  }
  const int columns = shape.intermediate_padded();
  swiglu_stride_ = RowFormat(kernels_.rows->activation, weights_.down_layout()).stride(columns);
  buffers_.intermediate.reserve(routing_.pairs() * swiglu_stride_);
  if (!prepares()) {
    intermediate_ = {buffers_.intermediate.data(), swiglu_stride_, 0};
    return;
  }
  const RowFormat& rows = down_gemm_.row_format();
  buffers_.prepared.reserve(routing_.pairs() * rows.stride(columns));
  intermediate_ = {buffers_.prepared.data(), rows.stride(columns), rows.elements(columns)};
}

void ForwardPass::plan_pieces() {
  for (int s = 0; s < engine_.pools().subpools(); ++s) {
    const size_t panel_sums = static_cast<size_t>(args_.routing.tokens) * kPanelRows * sizeof(float);
    const int panels = weights_.down_panels(s).count();
    const int threads = engine_.pools().threads_in(s);
    const int even_share = std::max(1, panels / (4 * threads));  // four strips a thread even out delays
    const int fits = std::max(2, static_cast<int>(kSumBytes / panel_sums));
    const int per_strip = std::min({kMaxStripPanels, even_share, fits});
    const auto pieces_of = [&](const ActiveExpert& expert) {
      return ceil_div(weights_.gate_up_panels(s).count(), pairs_per_piece(expert));
    };
    subpools_.emplace_back(routing_.experts(), pieces_of, ceil_div(panels, per_strip), per_strip);
  }
}

// Everything the workers need is reserved before they start: a job that waits at barriers must not throw.
void ForwardPass::reserve_scratch() {
  const ThreadPools& pools = engine_.pools();
  for (int worker = 0; worker < pools.threads(); ++worker) {
    const int subpool = pools.subpool_of(worker);
    const int node = pools.node_of(subpool);
    const size_t strip_columns = static_cast<size_t>(subpools_[subpool].panels_per_strip) * kPanelRows;
    WorkerScratch& scratch = engine_.scratch(worker);
    for (const ActiveExpert& expert : routing_.experts()) {
      gate_up_gemm_.reserve(scratch, expert.pairs, size_t{2} * pairs_per_piece(expert) * kPanelRows, node);
      down_gemm_.reserve(scratch, expert.pairs, strip_columns, node);
    }
    scratch.sum.reserve(args_.routing.tokens * strip_columns * sizeof(float), node);
    if (prepares()) scratch.row.reserve(config_.shape.hidden_padded() * sizeof(float), node);
  }
}

void ForwardPass::operator()(const Worker& worker) {
  if (converts_hidden_) {
    prepare_hidden(worker);
    worker.barrier();
  }
  gate_up(worker);
  worker.barrier();
  if (prepares()) {
    prepare_intermediate(worker);
    worker.barrier();
  }
  down(worker);
}

void ForwardPass::prepare_hidden(const Worker& worker) {
  const int hidden = config_.shape.hidden;
  const size_t in_bytes = args_.hidden_type == DType::kF32 ? 4 : 2;
  const ConvertFn convert = kernels_.rows->load_rows[static_cast<int>(args_.hidden_type)];
  for (int t = worker.index; t < args_.routing.tokens; t += worker.pools->threads()) {
    uint8_t* const out = buffers_.hidden.data() + t * hidden_.stride;
    uint8_t* const converted = prepares() ? engine_.scratch(worker.index).row.data() : out;
    convert(static_cast<const uint8_t*>(args_.hidden) + t * in_bytes * hidden, converted, hidden);
    std::memset(converted + hidden * swiglu_element(), 0, (config_.shape.hidden_padded() - hidden) * swiglu_element());
    if (!prepares()) continue;
    kernels_.prepare_row(
        {&weights_.gate_up_layout(), reinterpret_cast<const float*>(converted), out, out + hidden_.groups_at});
  }
}

void ForwardPass::gate_up(const Worker& worker) {
  subpools_[worker.subpool].pieces.take(
      engine_.pools().threads_in(worker.subpool),
      [&](const ActiveExpert& expert, int index) { return gate_up_piece(worker.subpool, expert, index); },
      [&](const GateUpPiece& taken, const GateUpPiece& next) { multiply_gate_up(worker, taken, next.panels); });
}

ForwardPass::GateUpPiece ForwardPass::gate_up_piece(int subpool, const ActiveExpert& expert, int index) const {
  const int first_pair = index * pairs_per_piece(expert);
  const int pairs = std::min(pairs_per_piece(expert), weights_.gate_up_panels(subpool).count() - first_pair);
  return {&expert, first_pair, pairs,
          weights_.gate_up(subpool, expert.expert) + 2 * first_pair * weights_.gate_up_layout().panel_bytes};
}

void ForwardPass::multiply_gate_up(const Worker& worker, const GateUpPiece& piece, const uint8_t* next_panels) {
  const ActiveExpert& expert = *piece.expert;
  const GroupedGemm::Panels panels = {piece.panels, 2 * piece.pairs, next_panels};
  const GroupedGemm::Rows rows = {hidden_, routing_.token_of_pair().data() + expert.first_pair, 0, expert.pairs};
  const size_t column =
      static_cast<size_t>(weights_.gate_up_panels(worker.subpool).begin + piece.first_pair) * kPanelRows;
  const auto swiglu = [&](const float* product, size_t stride, int first_row, int row_count) {
    uint8_t* const h = buffers_.intermediate.data() + (expert.first_pair + first_row) * swiglu_stride_;
    kernels_.rows->swiglu({product, stride, row_count, piece.pairs, h + column * swiglu_element(),
                           swiglu_stride_ / swiglu_element(), config_.swiglu_limit, config_.swiglu_alpha});
  };
  gate_up_gemm_.multiply(engine_.scratch(worker.index), panels, rows, swiglu);
}

void ForwardPass::prepare_intermediate(const Worker& worker) {
  for (int p = worker.index; p < routing_.pairs(); p += worker.pools->threads()) {
    const uint8_t* from = buffers_.intermediate.data() + p * swiglu_stride_;
    uint8_t* const out = buffers_.prepared.data() + p * intermediate_.stride;
    kernels_.prepare_row(
        {&weights_.down_layout(), reinterpret_cast<const float*>(from), out, out + intermediate_.groups_at});
  }
}

void ForwardPass::down(const Worker& worker) {
  SubpoolPlan& plan = subpools_[worker.subpool];
  while (true) {
    const int strip = plan.next_strip.fetch_add(1, std::memory_order_relaxed);
    if (strip >= plan.strips) return;
    down_strip(worker, strip);
  }
}

void ForwardPass::down_strip(const Worker& worker, int strip) {
  const SubpoolPlan& plan = subpools_[worker.subpool];
  const PanelRange share = weights_.down_panels(worker.subpool);
  const int first_panel = strip * plan.panels_per_strip;
  const int panels = std::min(plan.panels_per_strip, share.count() - first_panel);
  const int columns = panels * kPanelRows;
  const int following = (strip + engine_.pools().threads_in(worker.subpool)) * plan.panels_per_strip;

  WorkerScratch& scratch = engine_.scratch(worker.index);
  const size_t sum_bytes = static_cast<size_t>(args_.routing.tokens) * columns * sizeof(float);
  float* sum = scratch.sum.as<float>();
  std::memset(sum, 0, sum_bytes);

  const std::vector<ActiveExpert>& experts = routing_.experts();
  const PanelLayout& layout = weights_.down_layout();
  const auto panels_at = [&](const ActiveExpert& expert, int panel) {
    return weights_.down(worker.subpool, expert.expert) + panel * layout.panel_bytes;
  };
  for (size_t i = 0; i < experts.size(); ++i) {
    const ActiveExpert& expert = experts[i];
    const uint8_t* next = i + 1 < experts.size() ? panels_at(experts[i + 1], first_panel)
                                                 : panels_at(experts[0], std::min(following, share.count() - 1));
    const auto add = [&](const float* product, size_t stride, int first_row, int row_count) {
      const int pair = expert.first_pair + first_row;
      kernels_.rows->weighted_sum({product, stride, row_count, columns, routing_.token_of_pair().data() + pair,
                                   routing_.weight_of_pair().data() + pair, sum, static_cast<size_t>(columns)});
    };
    down_gemm_.multiply(scratch, {panels_at(expert, first_panel), panels, next},
                        {intermediate_, nullptr, expert.first_pair, expert.pairs}, add);
  }
  store_strip(sum, columns, (share.begin + first_panel) * kPanelRows, columns);
}

void ForwardPass::store_strip(const float* sum, size_t sum_stride, int first_column, int columns) const {
  const int hidden = config_.shape.hidden;
  const int live = std::min(columns, hidden - first_column);
  const size_t out_bytes = args_.output_type == DType::kF32 ? 4 : 2;
  const ConvertFn store = kernels_.rows->store_rows[static_cast<int>(args_.output_type)];
  const ConvertFn widen = kernels_.rows->widen_rows[static_cast<int>(args_.output_type)];
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
