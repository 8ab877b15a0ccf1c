#include "training/integer_backward.h"

namespace kt {

IntegerBackward::IntegerBackward(Engine& engine, const ExpertWeights& weights, const Routing& routing)
    : shape_(weights.shape()),
      down_(weights, {Projection::kDown}),
      gate_up_(weights, {Projection::kGate, Projection::kUp}),
      output_rows_(engine.pass_buffers().gradients),
      inner_rows_(engine.pass_buffers().prepared) {
  output_rows_.reserve(routing.pairs() * down_.row_stride());
  inner_rows_.reserve(routing.pairs() * gate_up_.row_stride());
  const ThreadPools& pools = engine.pools();
  for (int worker = 0; worker < pools.threads(); ++worker) {
    WorkerScratch& scratch = engine.scratch(worker);
    const int node = pools.node_of(pools.subpool_of(worker));
    for (const ActiveExpert& expert : routing.experts()) {
      down_.reserve(scratch, expert.pairs, node);
      gate_up_.reserve(scratch, expert.pairs, node);
    }
    scratch.gate.reserve((2 * shape_.hidden_padded() + kLargestInt8StepK) * sizeof(float), node);
  }
}

void IntegerBackward::prepare_output(WorkerScratch& scratch, int expert, int first, int count, const float* rows,
                                     size_t stride) const {
  const int columns = shape_.hidden_padded();
  float* const scales = scratch.gate.as<float>();
  down_.scales(expert, 0, 0, columns, scales);
  for (int i = 0; i < count; ++i) {
    down_.prepare(rows + i * stride, scales, 0, 0, columns, scales + columns,
                  output_rows_.data() + (first + i) * down_.row_stride());
  }
}

IntegerBackward::InnerScales IntegerBackward::inner_scales(int expert, const Strip& strip) const {
  InnerScales scales;
  gate_up_.scales(expert, 0, strip.first * kPanelRows, strip.columns(), scales.gate);
  gate_up_.scales(expert, 1, strip.first * kPanelRows, strip.columns(), scales.up);
  return scales;
}

void IntegerBackward::prepare_inner(int pair, const Strip& strip, const InnerScales& scales, const float* gate,
                                    const float* up) const {
  alignas(64) float room[InnerScales::kColumns];
  const int first = strip.first * kPanelRows, columns = strip.columns();
  uint8_t* const row = inner_rows_.data() + pair * gate_up_.row_stride();
  gate_up_.prepare(gate, scales.gate, 0, first, columns, room, row);
  gate_up_.prepare(up, scales.up, 1, first, columns, room, row);
}

}  // namespace kt
