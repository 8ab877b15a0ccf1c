#include "adapters/lora_adapter.h"

#include <algorithm>
#include <numeric>

namespace kt {
namespace {

std::vector<ActiveExpert> all_experts(const LayerShape& shape) {
  std::vector<ActiveExpert> experts;
  for (int e = 0; e < shape.num_experts; ++e) experts.push_back({e, 0, 0});
  return experts;
}

}  // namespace

// One call: what has been multiplied by A lies in `projected`, pairs in the order of the routing.
class LoraAdapter::Call : public PassAdditions {
 public:
  Call(Engine& engine, const LayerShape& shape, const PackedLora& lora, const RowKernels& rows, const Routing& routing,
       const ForwardArgs& args, float* projected)
      : engine_(engine),
        shape_(shape),
        lora_(lora),
        routing_(routing),
        hidden_(args.hidden, args.hidden_type, shape.hidden, rows),
        blocks_(row_blocks(routing)),
        kernels_(training_row_kernels()),
        projected_(projected) {
    const size_t columns = std::max(shape_.hidden_padded(), shape_.intermediate_padded());
    const ThreadPools& pools = engine.pools();
    for (int worker = 0; worker < pools.threads(); ++worker) {
      engine.scratch(worker).row.reserve(kRowsPerBlock * columns * sizeof(float),
                                         pools.node_of(pools.subpool_of(worker)));
    }
  }

  int pieces_before_gate_up() const override { return blocks_.count(); }
  int pieces_before_down() const override { return blocks_.count(); }

  void before_gate_up(const Worker& worker, int piece) override {
    const RowBlock block(routing_, blocks_.at(piece));
    const int columns = shape_.hidden_padded();
    float* const rows = engine_.scratch(worker.index).row.as<float>();
    for (int i = 0; i < block.count; ++i) {
      hidden_.load(routing_.token_of_pair()[block.first + i], {0, columns, shape_.hidden}, rows + i * columns);
    }
    const PackedLora::Expert lora = of(routing_.experts()[block.index]);
    project(rows, columns, lora.gate_a, block, Projection::kGate);
    project(rows, columns, lora.up_a, block, Projection::kUp);
  }

  void before_down(const Worker& worker, int piece, const IntermediateRows& intermediate) override {
    const RowBlock block(routing_, blocks_.at(piece));
    const int columns = shape_.intermediate_padded();
    float* const rows = engine_.scratch(worker.index).row.as<float>();
    const ElementRows elements = {const_cast<uint8_t*>(intermediate.data), intermediate.stride, &intermediate.kernels};
    for (int i = 0; i < block.count; ++i) elements.load(block.first + i, 0, columns, rows + i * columns);
    project(rows, columns, of(routing_.experts()[block.index]).down_a, block, Projection::kDown);
  }

  void gate_up(const ProductPlace& place, const ProductPanels& gate, const ProductPanels& up) override {
    const PackedLora::Expert lora = of(place.expert);
    add(place, gate, lora.gate_b, shape_.intermediate_padded(), Projection::kGate);
    add(place, up, lora.up_b, shape_.intermediate_padded(), Projection::kUp);
  }

  void down(const ProductPlace& place, const ProductPanels& product) override {
    add(place, product, of(place.expert).down_b, shape_.hidden_padded(), Projection::kDown);
  }

 private:
  PackedLora::Expert of(const ActiveExpert& expert) const { return lora_.of(expert.expert); }

  float* projected(Projection which, int pair) const {
    return projected_ + (size_t{1} * static_cast<int>(which) * routing_.pairs() + pair) * lora_.rank();
  }

  void project(const float* rows, size_t columns, const float* a, const RowBlock& block, Projection which) const {
    kernels_.dot_rows({rows, columns, block.count, a, columns, lora_.rank(), static_cast<int>(columns), lora_.scale(),
                       projected(which, block.first), static_cast<size_t>(lora_.rank())});
  }

  void add(const ProductPlace& place, const ProductPanels& product, const float* b, size_t stride,
           Projection which) const {
    const size_t rank = lora_.rank();
    for (int p = 0; p < product.panels; ++p) {
      kernels_.add_outer({projected(which, place.first_pair), rank, 1, product.rows, static_cast<int>(rank),
                          b + place.first_column + p * kPanelRows, stride, kPanelRows,
                          product.first + p * product.distance, product.stride});
    }
  }

  Engine& engine_;
  const LayerShape& shape_;
  const PackedLora& lora_;
  const Routing& routing_;
  TensorRows hidden_;
  ExpertPieces blocks_;
  const TrainingKernels& kernels_;
  float* projected_;
};

LoraAdapter::LoraAdapter(const Lora& lora, const LayerShape& shape, Engine& engine)
    : shape_(shape), lora_(lora, shape_, all_experts(shape_), engine.pools(), memory_) {}

PassAdditions& LoraAdapter::additions(Engine& engine, const RowKernels& rows, const Routing& routing,
                                      const ForwardArgs& args) {
  projected_.reserve(size_t{3} * routing.pairs() * lora_.rank() * sizeof(float));
  call_ = std::make_shared<Call>(engine, shape_, lora_, rows, routing, args, projected_.as<float>());
  return *call_;
}

std::vector<double> LoraAdapter::product(Projection which, int expert, const std::vector<double>& x) const {
  const PackedLora::Expert lora = lora_.of(expert);
  const bool down = which == Projection::kDown;
  const size_t in = down ? shape_.intermediate_padded() : shape_.hidden_padded();
  const size_t out = down ? shape_.hidden_padded() : shape_.intermediate_padded();
  const PerProjection<const float*> a = {{lora.gate_a, lora.up_a, lora.down_a}};
  const PerProjection<const float*> b = {{lora.gate_b, lora.up_b, lora.down_b}};
  std::vector<double> sums(out);
  for (int j = 0; j < lora_.rank(); ++j) {
    const double p = lora_.scale() * std::inner_product(x.begin(), x.end(), a[which] + j * in, 0.0);
    for (size_t i = 0; i < out; ++i) sums[i] += p * b[which][j * out + i];
  }
  return sums;
}

void adapt(MoeLayer& layer, const Lora* lora) {
  layer.require_weights();
  const auto lock = layer.engine().exclusive();
  layer.set_adapter(lora == nullptr ? nullptr
                                    : std::make_shared<LoraAdapter>(*lora, layer.config().shape, layer.engine()));
}

}  // namespace kt
