#include "training/forward.h"

#include <cstring>
#include <optional>
#include <stdexcept>

#include "moe/forward_pass.h"
#include "training/row_blocks.h"

namespace kt {
namespace {

class Additions : public PassAdditions {
 public:
  Additions(Engine& engine, const ExpertWeights& weights, const RowKernels& rows, const Routing& routing,
            const ForwardArgs& args, const Lora* lora, const SavedRows& saved)
      : engine_(engine),
        shape_(weights.shape()),
        routing_(routing),
        hidden_(args.hidden, args.hidden_type, shape_.hidden, rows),
        store_(rows.store_rows[static_cast<int>(saved.type)]),
        token_of_pair_(routing.token_of_pair().data()),
        saved_(saved),
        blocks_(row_blocks(routing)),
        kernels_(training_row_kernels()) {
    if (lora == nullptr) return;
    lora_.emplace(*lora, shape_, routing.experts(), engine.pools(), engine.pass_buffers().lora);
    const size_t columns = std::max(shape_.hidden_padded(), shape_.intermediate_padded());
    const ThreadPools& pools = engine.pools();
    for (int worker = 0; worker < pools.threads(); ++worker) {
      engine.scratch(worker).row.reserve(kRowsPerBlock * columns * sizeof(float),
                                         pools.node_of(pools.subpool_of(worker)));
    }
  }

  int pieces_before_gate_up() const override { return lora_ ? blocks_.count() : 0; }
  int pieces_before_down() const override { return lora_ ? blocks_.count() : 0; }

  void before_gate_up(const Worker& worker, int piece) override {
    const RowBlock block(routing_, blocks_.at(piece));
    const int columns = shape_.hidden_padded();
    float* const rows = engine_.scratch(worker.index).row.as<float>();
    const auto load = [&](Projection which) {
      for (int i = 0; i < block.count; ++i) {
        hidden_.load(token_of_pair_[block.first + i], {0, columns, shape_.hidden}, rows + i * columns);
        drop(which, block.first + i, columns, rows + i * columns);
      }
    };
    const PackedLora::Expert lora = lora_->of(block.index);
    load(Projection::kGate);
    project(rows, columns, lora.gate_a, block, Projection::kGate);
    if (lora_->drops()) load(Projection::kUp);
    project(rows, columns, lora.up_a, block, Projection::kUp);
  }

  void before_down(const Worker& worker, int piece, const IntermediateRows& intermediate) override {
    const RowBlock block(routing_, blocks_.at(piece));
    const int columns = shape_.intermediate_padded();
    float* const rows = engine_.scratch(worker.index).row.as<float>();
    const ElementRows elements = {const_cast<uint8_t*>(intermediate.data), intermediate.stride, &intermediate.kernels};
    for (int i = 0; i < block.count; ++i) {
      elements.load(block.first + i, 0, columns, rows + i * columns);
      drop(Projection::kDown, block.first + i, columns, rows + i * columns);
    }
    project(rows, columns, lora_->of(block.index).down_a, block, Projection::kDown);
  }

  void gate_up(const ProductPlace& place, const ProductPanels& gate, const ProductPanels& up) override {
    if (lora_) {
      const PackedLora::Expert lora = lora_->of(index_of(place));
      add(place, gate, lora.gate_b, shape_.intermediate_padded(), Projection::kGate);
      add(place, up, lora.up_b, shape_.intermediate_padded(), Projection::kUp);
    }
    if (saved_.gate == nullptr) return;
    save(place, gate, saved_.gate);
    save(place, up, saved_.up);
  }

  void down(const ProductPlace& place, const ProductPanels& product) override {
    if (lora_) add(place, product, lora_->of(index_of(place)).down_b, shape_.hidden_padded(), Projection::kDown);
  }

 private:
  size_t index_of(const ProductPlace& place) const { return &place.expert - routing_.experts().data(); }
  float* projected(Projection which, int pair) const {
    return saved_.projected + (size_t{1} * static_cast<int>(which) * routing_.pairs() + pair) * lora_->rank();
  }

  void drop(Projection which, int pair, int columns, float* row) const {
    lora_->drop(which, routing_.entry_of_pair()[pair], 0, columns, row);
  }
  void project(const float* rows, size_t columns, const float* a, const RowBlock& block, Projection which) const {
    kernels_.dot_rows({rows, columns, block.count, a, columns, lora_->rank(), static_cast<int>(columns), lora_->scale(),
                       projected(which, block.first), static_cast<size_t>(lora_->rank())});
  }

  void add(const ProductPlace& place, const ProductPanels& product, const float* b, size_t stride,
           Projection which) const {
    const size_t rank = lora_->rank();
    for (int p = 0; p < product.panels; ++p) {
      kernels_.add_outer({projected(which, place.first_pair), rank, 1, product.rows, static_cast<int>(rank),
                          b + place.first_column + p * kPanelRows, stride, kPanelRows,
                          product.first + p * product.distance, product.stride});
    }
  }

  void save(const ProductPlace& place, const ProductPanels& product, void* to) const {
    const size_t bytes = bytes_of_type(saved_.type);
    for (int r = 0; r < product.rows; ++r) {
      const size_t row = size_t{1} * (place.first_pair + r) * shape_.intermediate_padded() + place.first_column;
      for (int p = 0; p < product.panels; ++p) {
        store_(product.first + r * product.stride + p * product.distance,
               static_cast<uint8_t*>(to) + (row + p * kPanelRows) * bytes, kPanelRows);
      }
    }
  }

  Engine& engine_;
  const LayerShape& shape_;
  const Routing& routing_;
  TensorRows hidden_;
  ConvertFn store_;
  const int32_t* token_of_pair_;
  SavedRows saved_;
  ExpertPieces blocks_;
  const TrainingKernels& kernels_;
  std::optional<PackedLora> lora_;
};

}  // namespace

PerProjection<const KernelSet*> training_kernels(const LayerConfig& config, const ExpertWeights& weights) {
  PerProjection<const KernelSet*> kernels = weights.kernel_sets();
  if (config.swiglu_limit == 0) return kernels;
  for (const Projection p : kProjections) {
    const DispatchRow* row = chosen_row(Operation::kForward, weights.format(p), Activations::kBf16);
    if (row != nullptr) kernels[p] = row->kernels;
  }
  return kernels;
}

void training_forward(MoeLayer& layer, const ForwardArgs& args, const Lora* lora, const SavedRows& saved) {
  layer.check(args);
  if (args.routing.tokens == 0) return;
  Engine& engine = layer.engine();
  const auto lock = engine.exclusive();
  const auto weights = layer.require_weights();
  Routing routing;
  routing.group(args.routing, layer.config().shape.num_experts, layer.device_mask());
  if (routing.pairs() == 0) {
    std::memset(args.output, 0,
                size_t{1} * args.routing.tokens * layer.config().shape.hidden * bytes_of_type(args.output_type));
    return;
  }
  const auto kernels = training_kernels(layer.config(), *weights);
  Additions additions(engine, *weights, *kernels[Projection::kDown]->rows, routing, args, lora, saved);
  ForwardPass(engine, engine.pass_buffers(), layer.config(), *weights, kernels, routing, args, &additions).run();
}

}  // namespace kt
