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
  if (IntegerBackward::serves(weights, training_kernels(config, weights))) integers_.emplace(engine, weights, routing);
  inner_strip_panels_ = integers_ ? integers_->inner_strip_panels() : TransposedGemm::kMostStripPanels;
  const int most = integers_ ? integers_->hidden_strip_panels() : TransposedGemm::kMostStripPanels;
  hidden_strip_panels_ = std::clamp(panels / (kStripsPerThread * threads), 1, most);

  const RowFormat format(down_.kernels().activation, weights.layout(Projection::kDown));
  const size_t output_stride = format.stride(config.shape.hidden_padded());
  if (!integers_) buffers.hidden.reserve(args.routing.tokens * output_stride);
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
    if (!integers_) {
      for (const ActiveExpert& expert : routing_.experts()) {
        for (const TransposedGemm* gemm : {&gate_, &up_, &down_}) gemm->reserve(scratch, expert.pairs, node);
      }
      scratch.gate.reserve(size_t{1} * most * kMostColumns * sizeof(float), node);
    }
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
  const int inner_strips = ceil_div(down_.column_panels(), inner_strip_panels_);
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
      {Phase::of(integers_ ? 0 : ceil_div(tokens, kTokensPerPiece), prepare),
       Phase::of(reads_output() ? blocks_.count() : 0, of_output), Phase::of(experts * inner_strips, of_inner),
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

// dout as int8 kernels multiply it, and what thin products there are with it: q_down, and <dout, bias of down>.
void BackwardPass::output_rows(const Worker& worker, int piece) {
  const RowBlock block(routing_, blocks_.at(piece));
  const int columns = config_.shape.hidden_padded();
  const size_t stride = columns;
  float* const rows = engine_.scratch(worker.index).row.as<float>();
  for (int i = 0; i < block.count; ++i) {
    output_gradient_.load(routing_.token_of_pair()[block.first + i], {0, columns, config_.shape.hidden},
                          rows + i * stride);
  }
  const int expert = routing_.experts()[block.index].expert;
  if (integers_) {
    integers_->prepare_output(engine_.scratch(worker.index), expert, block.first, block.count, rows, stride);
  }
  if (lora_) {
    const size_t rank = lora_->rank();
    kernels_.dot_rows({rows, stride, block.count, lora_->of(block.index).down_b, stride, lora_->rank(), columns,
                       lora_->scale(), thin(Projection::kDown) + block.first * rank, rank});
  }
  const float* const bias = weights_.bias(Projection::kDown, expert, 0);
  if (bias == nullptr) return;
  kernels_.dot_rows({rows, stride, block.count, bias, stride, 1, columns, 1.0f, bias_sums_ + block.first, 1});
}

// sums += the LoRA's part of a product with `which`, columns of the strip.
void BackwardPass::add_thin(WorkerScratch& scratch, Projection which, const float* a, size_t a_stride,
                            const Strip& strip, const ThinRows& rows) const {
  const size_t rank = lora_->rank();
  const AddOuterArgs product = {thin(which) + rows.first * rank,
                                rank,
                                1,
                                rows.count,
                                lora_->rank(),
                                a + strip.first * kPanelRows,
                                a_stride,
                                strip.columns(),
                                rows.sums,
                                rows.stride};
  if (lora_->drops()) {
    add_thin_kept(scratch, product, which, rows.first, strip);
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
  const int strips = ceil_div(down_.column_panels(), inner_strip_panels_);
  const size_t index = piece / strips;
  const ActiveExpert& expert = routing_.experts()[index];
  const Strip strip = strip_of(down_, piece % strips, inner_strip_panels_);
  WorkerScratch& scratch = engine_.scratch(worker.index);
  std::optional<IntegerBackward::InnerScales> scales;
  if (integers_) scales = integers_->inner_scales(expert.expert, strip);
  const auto finish = [&](float* sums, size_t stride, int first_row, int rows) {
    const int first = expert.first_pair + first_row;
    if (lora_) {
      add_thin(scratch, Projection::kDown, lora_->of(index).down_a, config_.shape.intermediate_padded(), strip,
               {first, rows, sums, stride});
    }
    for (int i = 0; i < rows; ++i) inner_row(first + i, strip, sums + i * stride, scales ? &*scales : nullptr);
  };
  if (integers_) {
    integers_->multiply_down(scratch, expert, strip, finish);
    return;
  }
  float* const sums = scratch.gate.as<float>();
  down_.multiply(scratch, expert.expert, strip,
                 {output_rows_, routing_.token_of_pair().data() + expert.first_pair, 0, expert.pairs},
                 Store::kOverwrite, sums);
  finish(sums, strip.columns(), 0, expert.pairs);
}

void BackwardPass::inner_row(int pair, const Strip& strip, const float* dh,
                             const IntegerBackward::InnerScales* scales) {
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
  if (scales != nullptr) integers_->prepare_inner(pair, strip, *scales, gate, up);
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
  WorkerScratch& scratch = engine_.scratch(worker.index);
  float* const totals = scratch.sum.as<float>();
  std::fill_n(totals, size_t{1} * args_.routing.tokens * strip.columns(), 0.0f);
  const auto add = integers_ ? &BackwardPass::hidden_integer_product : &BackwardPass::hidden_product;
  for (size_t index = 0; index < routing_.experts().size(); ++index) (this->*add)(scratch, index, strip, totals);
  store_hidden(totals, strip);
}

void BackwardPass::hidden_product(WorkerScratch& scratch, size_t index, const Strip& strip, float* totals) const {
  const ActiveExpert& expert = routing_.experts()[index];
  const RowTable dgate = {dgate_.data, dgate_.stride, 0}, dup = {dup_.data, dup_.stride, 0};
  const int first = expert.first_pair;
  float* const sums = scratch.gate.as<float>();
  gate_.multiply(scratch, expert.expert, strip, {dgate, nullptr, first, expert.pairs}, Store::kOverwrite, sums);
  up_.multiply(scratch, expert.expert, strip, {dup, nullptr, first, expert.pairs}, Store::kAccumulate, sums);
  add_hidden(scratch, index, strip, {first, expert.pairs, sums, static_cast<size_t>(strip.columns())}, totals);
}

void BackwardPass::hidden_integer_product(WorkerScratch& scratch, size_t index, const Strip& strip,
                                          float* totals) const {
  const ActiveExpert& expert = routing_.experts()[index];
  integers_->multiply_gate_up(scratch, expert, strip, [&](float* sums, size_t stride, int first_row, int rows) {
    add_hidden(scratch, index, strip, {expert.first_pair + first_row, rows, sums, stride}, totals);
  });
}

// With the LoRA's part, to the tokens of the rows.
void BackwardPass::add_hidden(WorkerScratch& scratch, size_t index, const Strip& strip, const ThinRows& rows,
                              float* totals) const {
  const size_t columns = strip.columns(), a_stride = config_.shape.hidden_padded();
  if (lora_) {
    const PackedLora::Expert lora = lora_->of(index);
    add_thin(scratch, Projection::kGate, lora.gate_a, a_stride, strip, rows);
    add_thin(scratch, Projection::kUp, lora.up_a, a_stride, strip, rows);
  }
  rows_.weighted_sum({rows.sums, rows.stride, rows.count, strip.columns(), routing_.token_of_pair().data() + rows.first,
                      ones_.data(), totals, columns});
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
