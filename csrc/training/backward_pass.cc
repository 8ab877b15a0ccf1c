#include "training/backward_pass.h"

#include <algorithm>
#include <cstring>

#include "training/lora_gradients.h"

namespace kt {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A column of strips for each thread and some more, so that delays even out.
constexpr int kStripsPerThread = 4;

constexpr int kMostColumns = TransposedGemm::kMostStripPanels * kPanelRows;

ElementRows element_rows(Buffer& buffer, size_t offset, size_t stride, const RowKernels& rows) {
  return {buffer.data() + offset, stride, &rows};
}

}  // namespace

BackwardPass::BackwardPass(Engine& engine, const LayerConfig& config, const ExpertWeights& weights,
                           const Routing& routing, const BackwardArgs& args)
    : engine_(engine),
      config_(config),
      weights_(weights),
      routing_(routing),
      args_(args),
      kernels_(training_row_kernels()),
      gate_(weights, Projection::kGate),
      up_(weights, Projection::kUp),
      down_(weights, Projection::kDown),
      rows_(*down_.kernels().rows),
      hidden_(args.hidden, args.type, config.shape.hidden, rows_),
      output_gradient_(args.output_gradient, args.type, config.shape.hidden, rows_),
      saved_gate_(args.saved.gate, args.saved.type, config.shape.intermediate_padded(), rows_),
      saved_up_(args.saved.up, args.saved.type, config.shape.intermediate_padded(), rows_),
      blocks_(row_blocks(routing)) {
  PassBuffers& buffers = engine.pass_buffers();
  if (args.lora != nullptr) lora_.emplace(*args.lora, config.shape, routing.experts(), engine.pools(), buffers.lora);
  const int threads = engine.pools().threads();
  const int panels = config.shape.hidden_panels();
  hidden_strip_panels_ = std::clamp(panels / (kStripsPerThread * threads), 1, TransposedGemm::kMostStripPanels);

  const RowFormat format(down_.kernels().activation, weights.layout(Projection::kDown));
  const size_t output_stride = format.stride(config.shape.hidden_padded());
  buffers.hidden.reserve(args.routing.tokens * output_stride);
  output_rows_ = {buffers.hidden.data(), output_stride, 0};
  const size_t stride = format.stride(config.shape.intermediate_padded());
  const size_t pairs = routing.pairs();
  for (Buffer* buffer : {&buffers.gate_gradient, &buffers.up_gradient, &buffers.intermediate}) {
    buffer->reserve(pairs * stride);
  }
  dgate_ = element_rows(buffers.gate_gradient, 0, stride, rows_);
  dup_ = element_rows(buffers.up_gradient, 0, stride, rows_);
  h_ = element_rows(buffers.intermediate, 0, stride, rows_);
  const size_t rank = lora_ ? lora_->rank() : 0;
  buffers.thin.reserve(pairs * (3 * rank + config.shape.intermediate_panels() + 1) * sizeof(float));
  thin_ = buffers.thin.as<float>();
  sums_ = thin_ + 3 * pairs * rank;
  bias_sums_ = sums_ + pairs * config.shape.intermediate_panels();
  reserve();
}

// Everything the workers need is reserved before they start, on their own node.
void BackwardPass::reserve() {
  const ThreadPools& pools = engine_.pools();
  int most = 0;
  for (const ActiveExpert& expert : routing_.experts()) most = std::max(most, expert.pairs);
  ones_.assign(most, 1.0f);
  const int columns = std::max({config_.shape.hidden_padded(), config_.shape.intermediate_padded(), kMostColumns});
  for (int worker = 0; worker < pools.threads(); ++worker) {
    WorkerScratch& scratch = engine_.scratch(worker);
    const int node = pools.node_of(pools.subpool_of(worker));
    for (const ActiveExpert& expert : routing_.experts()) {
      for (const TransposedGemm* gemm : {&gate_, &up_, &down_}) gemm->reserve(scratch, expert.pairs, node);
    }
    scratch.gate.reserve(size_t{1} * most * kMostColumns * sizeof(float), node);
    scratch.sum.reserve(size_t{1} * args_.routing.tokens * hidden_strip_panels_ * kPanelRows * sizeof(float), node);
    scratch.row.reserve(size_t{1} * kRowsPerBlock * columns * sizeof(float), node);
  }
}

float* BackwardPass::thin(Projection which) const {
  return thin_ + size_t{1} * static_cast<int>(which) * routing_.pairs() * lora_->rank();
}

BackwardPass::Strip BackwardPass::strip_of(const TransposedGemm& gemm, int index, int panels) const {
  return {index * panels, std::min(panels, gemm.column_panels() - index * panels)};
}

void BackwardPass::run() {
  const int experts = static_cast<int>(routing_.experts().size());
  const int tokens = args_.routing.tokens;
  const int inner_strips = ceil_div(down_.column_panels(), TransposedGemm::kMostStripPanels);
  const bool gradients = args_.lora_gradients != nullptr;
  const bool gate_up_rows_needed = lora_ && (gradients || args_.hidden_gradient != nullptr);
  std::optional<LoraGradientPieces> lora_gradients;
  GradientInputs inputs{hidden_, output_gradient_, dgate_, dup_, h_, {}, {}};
  if (gradients) {
    lora_gradients.emplace(engine_, config_.shape, routing_, *lora_, *args_.lora_gradients);
    for (const Projection p : kProjections) {
      inputs.q[p] = thin(p);
      inputs.projected[p] = args_.saved.projected + size_t{1} * static_cast<int>(p) * routing_.pairs() * lora_->rank();
    }
  }
  std::optional<BaseGradientPieces> base_gradients;
  if (args_.base_gradients != nullptr) base_gradients.emplace(engine_, config_.shape, routing_, *args_.base_gradients);
  constexpr int kTokensPerPiece = 16;
  const auto prepare = [&](const Worker&, int piece) {
    const int end = std::min(tokens, (piece + 1) * kTokensPerPiece);
    for (int t = piece * kTokensPerPiece; t < end; ++t) prepare_output_gradient(t);
  };
  const auto of_output = [&](const Worker& worker, int piece) { output_rows(worker, piece); };
  const auto of_inner = [&](const Worker& worker, int piece) { inner(worker, piece); };
  const auto of_gate_up = [&](const Worker& worker, int piece) { gate_up_rows(worker, piece); };
  const auto of_lora = [&](const Worker& worker, int piece) { lora_gradients->compute(inputs, worker, piece); };
  const auto of_base = [&](const Worker& worker, int piece) { base_gradients->compute(inputs, worker, piece); };
  const auto of_hidden = [&](const Worker& worker, int piece) { hidden_strip(worker, piece); };
  const int hidden_strips =
      args_.hidden_gradient == nullptr ? 0 : ceil_div(gate_.column_panels(), hidden_strip_panels_);
  engine_.pools().run(
      {Phase::of(ceil_div(tokens, kTokensPerPiece), prepare),
       Phase::of(thin_of_output() ? blocks_.count() : 0, of_output), Phase::of(experts * inner_strips, of_inner),
       Phase::of(gate_up_rows_needed ? blocks_.count() : 0, of_gate_up),
       Phase::of(gradients ? lora_gradients->count() : 0, of_lora),
       Phase::of(base_gradients ? base_gradients->count() : 0, of_base), Phase::of(hidden_strips, of_hidden)});
  if (args_.weight_gradient != nullptr) weight_gradients();
}

void BackwardPass::prepare_output_gradient(int token) {
  const int hidden = config_.shape.hidden;
  const size_t element = dgate_.element();
  uint8_t* const to = const_cast<uint8_t*>(output_rows_.data) + token * output_rows_.stride;
  const size_t from = size_t{1} * token * hidden * bytes_of_type(args_.type);
  rows_.load_rows[static_cast<int>(args_.type)](output_gradient_.data + from, to, hidden);
  std::memset(to + hidden * element, 0, (config_.shape.hidden_padded() - hidden) * element);
}

// What thin products there are with dout: q_down, and <dout, bias of down>.
void BackwardPass::output_rows(const Worker& worker, int piece) {
  const RowBlock block(routing_, blocks_.at(piece));
  const int columns = config_.shape.hidden_padded();
  const size_t stride = columns;
  float* const rows = engine_.scratch(worker.index).row.as<float>();
  for (int i = 0; i < block.count; ++i) {
    output_gradient_.load(routing_.token_of_pair()[block.first + i], {0, columns, config_.shape.hidden},
                          rows + i * stride);
  }
  if (lora_) {
    const size_t rank = lora_->rank();
    kernels_.dot_rows({rows, stride, block.count, lora_->of(block.index).down_b, stride, lora_->rank(), columns,
                       lora_->scale(), thin(Projection::kDown) + block.first * rank, rank});
  }
  const float* const bias = weights_.bias(Projection::kDown, routing_.experts()[block.index].expert, 0);
  if (bias == nullptr) return;
  kernels_.dot_rows({rows, stride, block.count, bias, stride, 1, columns, 1.0f, bias_sums_ + block.first, 1});
}

// sums += the LoRA's part of a product with `which`, columns of the strip.
void BackwardPass::add_thin(WorkerScratch& scratch, Projection which, const ActiveExpert& expert, const float* a,
                            size_t a_stride, const Strip& strip, float* sums) const {
  const size_t rank = lora_->rank();
  const size_t columns = strip.columns();
  const AddOuterArgs product = {thin(which) + expert.first_pair * rank,
                                rank,
                                1,
                                expert.pairs,
                                lora_->rank(),
                                a + strip.first * kPanelRows,
                                a_stride,
                                strip.columns(),
                                sums,
                                columns};
  if (lora_->drops()) {
    add_thin_kept(scratch, product, which, expert.first_pair, strip);
  } else {
    kernels_.add_outer(product);
  }
}

// The same of the inputs that dropout has kept.
void BackwardPass::add_thin_kept(WorkerScratch& scratch, const AddOuterArgs& product, Projection which, int first_pair,
                                 const Strip& strip) const {
  const int columns = strip.columns();
  float* const room = scratch.row.as<float>();
  for (int row = 0; row < product.rows; row += kRowsPerBlock) {
    AddOuterArgs block = product;
    block.left += row * product.left_row;
    block.rows = std::min(kRowsPerBlock, product.rows - row);
    block.out = room;
    std::fill_n(room, block.rows * columns, 0.0f);
    kernels_.add_outer(block);
    for (int i = 0; i < block.rows; ++i) {
      float* const from = room + i * columns;
      lora_->drop(which, routing_.entry_of_pair()[first_pair + row + i], strip.first * kPanelRows, columns, from);
      float* const to = product.out + (row + i) * product.out_stride;
      for (int c = 0; c < columns; ++c) to[c] += from[c];
    }
  }
}

// dh of an expert's rows and a strip of intermediate columns, and what it becomes there.
void BackwardPass::inner(const Worker& worker, int piece) {
  const int strips = ceil_div(down_.column_panels(), TransposedGemm::kMostStripPanels);
  const size_t index = piece / strips;
  const ActiveExpert& expert = routing_.experts()[index];
  const Strip strip = strip_of(down_, piece % strips, TransposedGemm::kMostStripPanels);
  WorkerScratch& scratch = engine_.scratch(worker.index);
  float* const sums = scratch.gate.as<float>();
  down_.multiply(scratch, expert.expert, strip,
                 {output_rows_, routing_.token_of_pair().data() + expert.first_pair, 0, expert.pairs},
                 Store::kOverwrite, sums);
  if (lora_) {
    add_thin(scratch, Projection::kDown, expert, lora_->of(index).down_a, config_.shape.intermediate_padded(), strip,
             sums);
  }
  for (int i = 0; i < expert.pairs; ++i) inner_row(expert.first_pair + i, strip, sums + i * strip.columns());
}

void BackwardPass::inner_row(int pair, const Strip& strip, const float* dh) {
  alignas(64) float gate[kMostColumns], up[kMostColumns], h[kMostColumns];
  const int first = strip.first * kPanelRows, columns = strip.columns();
  saved_gate_.load(pair, {first, columns, saved_gate_.columns}, gate);
  saved_up_.load(pair, {first, columns, saved_up_.columns}, up);
  kernels_.swiglu_backward({dh, gate, up, routing_.weight_of_pair()[pair], columns, config_.swiglu_limit,
                            config_.swiglu_alpha, gate, up, h, sums_of_row(pair) + strip.first});
  dgate_.store(gate, pair, first, columns);
  dup_.store(up, pair, first, columns);
  const bool needs_h = args_.lora_gradients != nullptr || args_.base_gradients != nullptr;
  if (needs_h) h_.store(h, pair, first, columns);
}

// q_gate and q_up.
void BackwardPass::gate_up_rows(const Worker& worker, int piece) {
  const RowBlock block(routing_, blocks_.at(piece));
  const int columns = config_.shape.intermediate_padded();
  const size_t stride = columns, rank = lora_->rank();
  float* const rows = engine_.scratch(worker.index).row.as<float>();
  const PackedLora::Expert lora = lora_->of(block.index);
  const auto multiply = [&](const ElementRows& elements, const float* b, Projection which) {
    for (int i = 0; i < block.count; ++i) elements.load(block.first + i, 0, columns, rows + i * stride);
    kernels_.dot_rows({rows, stride, block.count, b, stride, lora_->rank(), columns, lora_->scale(),
                       thin(which) + block.first * rank, rank});
  };
  multiply(dgate_, lora.gate_b, Projection::kGate);
  multiply(dup_, lora.up_b, Projection::kUp);
}

// A strip of dx, of all tokens.
void BackwardPass::hidden_strip(const Worker& worker, int piece) {
  const Strip strip = strip_of(gate_, piece, hidden_strip_panels_);
  const size_t columns = strip.columns();
  WorkerScratch& scratch = engine_.scratch(worker.index);
  float* const totals = scratch.sum.as<float>();
  float* const sums = scratch.gate.as<float>();
  std::fill_n(totals, args_.routing.tokens * columns, 0.0f);
  const RowTable dgate = {dgate_.data, dgate_.stride, 0}, dup = {dup_.data, dup_.stride, 0};
  const size_t a_stride = config_.shape.hidden_padded();
  for (size_t index = 0; index < routing_.experts().size(); ++index) {
    const ActiveExpert& expert = routing_.experts()[index];
    const int first = expert.first_pair;
    gate_.multiply(scratch, expert.expert, strip, {dgate, nullptr, first, expert.pairs}, Store::kOverwrite, sums);
    up_.multiply(scratch, expert.expert, strip, {dup, nullptr, first, expert.pairs}, Store::kAccumulate, sums);
    if (lora_) {
      const PackedLora::Expert lora = lora_->of(index);
      add_thin(scratch, Projection::kGate, expert, lora.gate_a, a_stride, strip, sums);
      add_thin(scratch, Projection::kUp, expert, lora.up_a, a_stride, strip, sums);
    }
    rows_.weighted_sum({sums, columns, expert.pairs, strip.columns(), routing_.token_of_pair().data() + first,
                        ones_.data(), totals, columns});
  }
  store_hidden(totals, strip);
}

void BackwardPass::store_hidden(const float* sums, const Strip& strip) const {
  const int hidden = config_.shape.hidden;
  const int first = strip.first * kPanelRows;
  const int live = std::min(strip.columns(), hidden - first);
  const ConvertFn store = rows_.store_rows[static_cast<int>(args_.type)];
  for (int t = 0; t < args_.routing.tokens; ++t) {
    store(sums + size_t{1} * t * strip.columns(),
          static_cast<uint8_t*>(args_.hidden_gradient) + (size_t{1} * t * hidden + first) * bytes_of_type(args_.type),
          live);
  }
}

void BackwardPass::weight_gradients() const {
  const int panels = config_.shape.intermediate_panels();
  for (int pair = 0; pair < routing_.pairs(); ++pair) {
    float sum = has_down_bias() ? bias_sums_[pair] : 0.0f;
    for (int p = 0; p < panels; ++p) sum += sums_of_row(pair)[p];
    args_.weight_gradient[routing_.entry_of_pair()[pair]] = sum;
  }
}

void training_backward(MoeLayer& layer, const BackwardArgs& args) {
  const auto weights = layer.require_weights();
  if (args.routing.tokens == 0) return;
  Engine& engine = layer.engine();
  const auto lock = engine.exclusive();
  Routing routing;
  routing.group(args.routing, layer.config().shape.num_experts, layer.device_mask());
  if (routing.pairs() == 0) {
    const size_t bytes = size_t{1} * args.routing.tokens * layer.config().shape.hidden * bytes_of_type(args.type);
    if (args.hidden_gradient != nullptr) std::memset(args.hidden_gradient, 0, bytes);
    return;
  }
  BackwardPass(engine, layer.config(), *weights, routing, args).run();
}

}  // namespace kt
