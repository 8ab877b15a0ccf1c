#include "moe/forward_pass.h"

#include <algorithm>
#include <cstring>

namespace kt {
namespace {

// Blocking of the many-token GEMM: the activations of one block (tokens x k) stay in L2 while the panels of a piece
// pass by, with room left for the products. Xeon 6 (AMX, 2 MiB L2), 2 threads, 2026-11-21, 1024 tokens, shapes S / L of
// bench/: 256 KiB 66 / 306 ms, 128 KiB and 256 tokens 71 / 313 ms, 512 KiB 66 / 365 ms.
constexpr int kBlockTokens = 512;
constexpr size_t kBlockBytes = size_t{256} << 10;
constexpr int kMinBlockK = 256;

// A piece of gate/up for few tokens: as many gate+up panel pairs as make about this many bytes, long enough a stream
// and fine enough to share evenly. For many tokens kPairsForMany, so that gathering the activations costs little (S / L
// as above: eight pairs 73 / 344 ms, four 76 / 342 ms, sixteen 74 / 370 ms, before the block sizes were chosen).
constexpr size_t kPieceBytes = size_t{256} << 10;
constexpr int kManyTokens = 32;
constexpr int kPairsForMany = 8;

// A strip of hidden columns keeps one fp32 sum per token: at most this many bytes of sums for many tokens.
constexpr size_t kSumBytes = size_t{1} << 20;
constexpr int kMaxStripPanels = 8;

// Rows of 16 tokens a multiple of 4 KiB apart would fall into the same set of a 48 KiB, 12-way L1.
constexpr size_t kRowPadding = 32;

int ceil_div(int a, int b) { return (a + b - 1) / b; }
size_t padded_stride(int k) { return static_cast<size_t>(k) + kRowPadding; }

}  // namespace

ForwardPass::ForwardPass(Engine& engine, const KernelSet& kernels, const LayerConfig& config,
                         const ExpertWeights& weights, const Routing& routing, const ForwardArgs& args)
    : engine_(engine),
      kernels_(kernels),
      config_(config),
      weights_(weights),
      routing_(routing),
      args_(args),
      subpools_(engine.pools().subpools()) {
  plan(engine);
  reserve_scratch(engine);
}

int ForwardPass::pairs_per_piece(const ActiveExpert& expert) const {
  if (expert.pairs >= kManyTokens) return kPairsForMany;
  return std::max(1, static_cast<int>(kPieceBytes / (2 * weights_.gate_up_layout().panel_bytes)));
}

void ForwardPass::plan(Engine& engine) {
  const LayerShape& shape = config_.shape;
  const int tokens = args_.routing.tokens;

  converts_hidden_ = args_.hidden_type != DType::kBf16 || kernels_.rows->activation != Activation::kBf16 ||
                     shape.hidden != shape.hidden_padded();
  if (converts_hidden_) {
    hidden_stride_ = shape.hidden_padded();
    engine.rows().reserve(tokens * hidden_stride_ * element_bytes());
    hidden_rows_ = engine.rows().data();
  } else {
    hidden_stride_ = shape.hidden;
    hidden_rows_ = static_cast<const uint8_t*>(args_.hidden);
  }
  intermediate_stride_ = padded_stride(shape.intermediate_panels() * kPanelRows);
  engine.intermediate().reserve(routing_.pairs() * intermediate_stride_ * element_bytes());
  intermediate_ = engine.intermediate().data();

  for (int s = 0; s < engine.pools().subpools(); ++s) {
    SubpoolPlan& plan = subpools_[s];
    int pieces = 0;
    for (const ActiveExpert& expert : routing_.experts()) {
      plan.first_piece.push_back(pieces);
      pieces += ceil_div(weights_.gate_up_panels(s).count(), pairs_per_piece(expert));
    }
    plan.first_piece.push_back(pieces);

    const size_t panel_sums = static_cast<size_t>(tokens) * kPanelRows * sizeof(float);
    const int panels = weights_.down_panels(s).count();
    const int threads = engine.pools().threads_in(s);
    const int even_share = std::max(1, panels / (4 * threads));  // four strips a thread even out delays
    const int fits = std::max(2, static_cast<int>(kSumBytes / panel_sums));
    plan.panels_per_strip = std::min({kMaxStripPanels, even_share, fits});
    plan.strips = ceil_div(panels, plan.panels_per_strip);
  }
}

// Everything the workers need is reserved before they start: a job that waits at barriers must not throw.
void ForwardPass::reserve_scratch(Engine& engine) {
  for (int s = 0; s < engine.pools().subpools(); ++s) {
    const size_t strip_columns = static_cast<size_t>(subpools_[s].panels_per_strip) * kPanelRows;
    size_t product = 0;
    size_t gathered = 0;
    size_t wide = 0;
    for (const ActiveExpert& expert : routing_.experts()) {
      const Block block = block_of(expert.pairs, weights_.gate_up_layout().k_padded);
      const size_t columns = std::max(size_t{2} * pairs_per_piece(expert) * kPanelRows, strip_columns);
      product = std::max(product, block.rows * columns * sizeof(float));
      if (kernels_.widens_rows) {
        const Block widest =
            block_of(expert.pairs, std::max(weights_.gate_up_layout().k_padded, weights_.down_layout().k_padded));
        wide = std::max(wide, widest.rows * (widest.k + kWideRowPadding) * sizeof(float));
      }
      if (block.rows > 1) gathered = std::max(gathered, block.rows * padded_stride(block.k) * element_bytes());
    }
    for (int worker = 0; worker < engine.pools().threads(); ++worker) {
      if (engine.pools().subpool_of(worker) != s) continue;
      WorkerScratch& scratch = engine.scratch(worker);
      const int node = engine.pools().node_of(s);
      scratch.product.reserve(product, node);
      scratch.gathered.reserve(gathered, node);
      scratch.wide.reserve(wide, node);
      scratch.sum.reserve(args_.routing.tokens * strip_columns * sizeof(float), node);
    }
  }
}

// Blocks of tokens x K are cut so that a block's activations stay in L2.
ForwardPass::Block ForwardPass::block_of(int rows, int k) const {
  const int block_rows = std::min(rows, kBlockTokens);
  const int fitting = static_cast<int>(kBlockBytes / (block_rows * element_bytes())) / kLargestStepK * kLargestStepK;
  return {block_rows, std::min(k, std::max(kMinBlockK, fitting))};
}

void ForwardPass::operator()(const Worker& worker) {
  if (converts_hidden_) {
    convert_hidden(worker);
    worker.barrier();
  }
  gate_up(worker);
  worker.barrier();
  down(worker);
}

void ForwardPass::convert_hidden(const Worker& worker) {
  const int tokens = args_.routing.tokens;
  const int threads = worker.pools->threads();
  const int hidden = config_.shape.hidden;
  const size_t in_bytes = args_.hidden_type == DType::kF32 ? 4 : 2;
  const size_t pad = (config_.shape.hidden_padded() - hidden) * element_bytes();
  const ConvertFn convert = kernels_.rows->load_rows[static_cast<int>(args_.hidden_type)];
  for (int t = worker.index; t < tokens; t += threads) {
    uint8_t* out = engine_.rows().data() + t * hidden_stride_ * element_bytes();
    convert(static_cast<const uint8_t*>(args_.hidden) + t * in_bytes * hidden, out, hidden);
    std::memset(out + hidden * element_bytes(), 0, pad);
  }
}

void ForwardPass::gate_up(const Worker& worker) {
  SubpoolPlan& plan = subpools_[worker.subpool];
  const int total = plan.first_piece.back();
  const int threads = engine_.pools().threads_in(worker.subpool);
  // Pieces are taken in ascending order, so the expert is found by walking on.
  const auto walk = [&](size_t& expert, int piece) {
    while (plan.first_piece[expert + 1] <= piece) ++expert;
    return gate_up_piece(worker.subpool, routing_.experts()[expert], piece - plan.first_piece[expert]);
  };
  size_t expert = 0;
  size_t next_expert = 0;
  while (true) {
    const int piece = plan.next_expert_piece.fetch_add(1, std::memory_order_relaxed);
    if (piece >= total) return;
    const GateUpPiece taken = walk(expert, piece);
    // The others take one each meanwhile, so this one is likely ours.
    const GateUpPiece next = walk(next_expert, std::min(piece + threads, total - 1));
    multiply_gate_up(worker, taken, next.panels);
  }
}

ForwardPass::GateUpPiece ForwardPass::gate_up_piece(int subpool, const ActiveExpert& expert, int index) const {
  const int first_pair = index * pairs_per_piece(expert);
  const int pairs = std::min(pairs_per_piece(expert), weights_.gate_up_panels(subpool).count() - first_pair);
  return {&expert, first_pair, pairs,
          weights_.gate_up(subpool, expert.expert) + 2 * first_pair * weights_.gate_up_layout().panel_bytes};
}

void ForwardPass::multiply_gate_up(const Worker& worker, const GateUpPiece& piece, const uint8_t* next_panels) {
  const ActiveExpert& expert = *piece.expert;
  const Operand operand = {weights_.gate_up_layout(), piece.panels, 2 * piece.pairs, next_panels};
  const Rows rows = {hidden_rows_, hidden_stride_, routing_.token_of_pair().data() + expert.first_pair, 0,
                     expert.pairs};
  const size_t column =
      static_cast<size_t>(weights_.gate_up_panels(worker.subpool).begin + piece.first_pair) * kPanelRows;
  multiply(engine_.scratch(worker.index), operand, rows,
           [&](const float* product, size_t stride, int first_row, int row_count) {
             const size_t h_row = expert.first_pair + first_row;
             kernels_.rows->swiglu({product, stride, row_count, piece.pairs,
                                    intermediate_ + (h_row * intermediate_stride_ + column) * element_bytes(),
                                    intermediate_stride_, config_.swiglu_limit, config_.swiglu_alpha});
           });
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
    const Operand operand = {layout, panels_at(expert, first_panel), panels, next};
    const Rows rows = {intermediate_, intermediate_stride_, nullptr, expert.first_pair, expert.pairs};
    multiply(scratch, operand, rows, [&](const float* product, size_t stride, int first_row, int row_count) {
      const int pair = expert.first_pair + first_row;
      kernels_.rows->weighted_sum({product, stride, row_count, columns, routing_.token_of_pair().data() + pair,
                                   routing_.weight_of_pair().data() + pair, sum, static_cast<size_t>(columns)});
    });
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

// Rows of one block side by side: the rows themselves when they already are, else a copy in the worker's scratch.
const uint8_t* ForwardPass::gathered(WorkerScratch& scratch, const Rows& rows, int first_row, int row_count,
                                     int first_k, int k_count, size_t* stride) const {
  const size_t bytes = element_bytes();
  const auto source = [&](int row) {
    const size_t at = rows.index != nullptr ? rows.index[row] : rows.first + row;
    return rows.data + (at * rows.stride + first_k) * bytes;
  };
  if (rows.index == nullptr || row_count == 1) {
    *stride = rows.stride;
    return source(first_row);
  }
  *stride = padded_stride(k_count);
  for (int r = 0; r < row_count; ++r) {
    std::memcpy(scratch.gathered.data() + r * *stride * bytes, source(first_row + r), k_count * bytes);
  }
  return scratch.gathered.data();
}

// All rows of one expert against the panels of one piece. The product of a block of tokens is complete when
// `epilogue(product, stride, first_row, rows)` sees it.
template <class Epilogue>
void ForwardPass::multiply(WorkerScratch& scratch, const Operand& w, const Rows& rows, Epilogue epilogue) {
  const size_t columns = static_cast<size_t>(w.panel_count) * kPanelRows;
  const int k_total = w.layout.k_padded;
  const Block block = block_of(rows.count, k_total);
  float* product = scratch.product.as<float>();

  for (int r = 0; r < rows.count; r += block.rows) {
    const int row_count = std::min(block.rows, rows.count - r);
    for (int k = 0; k < k_total; k += block.k) {
      const int k_count = std::min(block.k, k_total - k);
      size_t stride = 0;
      const uint8_t* a = gathered(scratch, rows, r, row_count, k, k_count, &stride);
      kernels_.gemm({&w.layout, w.panels, w.next_panels, w.panel_count, a, stride, row_count, k, k_count, product,
                     columns, k == 0 ? Store::kOverwrite : Store::kAccumulate, scratch.decoded.data(),
                     scratch.wide.as<float>()});
    }
    epilogue(product, columns, r, row_count);
  }
}

}  // namespace kt
