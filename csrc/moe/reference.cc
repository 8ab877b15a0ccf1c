#include "moe/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "formats/numbers.h"

namespace kt {
namespace {

// Row `row` of a matrix times `x`; the panels of a matrix may be shared out over sub-pools.
template <class PanelOf>
double row_times(const ExpertWeights& weights, const PanelLayout& layout, const std::vector<double>& x, int row,
                 PanelOf panel_of) {
  const uint8_t* panel = panel_of(row / kPanelRows);
  double sum = 0;
  for (size_t k = 0; k < x.size(); ++k) {
    sum += element(weights.format(), layout, panel, row % kPanelRows, static_cast<int>(k)) * x[k];
  }
  return sum;
}

double gated(double gate, double up, const LayerConfig& config) {
  const double limit = config.swiglu_limit;
  const double alpha = config.swiglu_alpha;
  if (limit > 0) {
    gate = alpha > 0 ? std::clamp(gate, -limit, limit) : std::min(gate, limit);
    up = std::clamp(up, -limit, limit);
  }
  if (alpha > 0) return gate / (1 + std::exp(-alpha * gate)) * (up + 1);
  return gate / (1 + std::exp(-gate)) * up;
}

int subpool_with(const ExpertWeights& weights, int panel, PanelRange (ExpertWeights::*range)(int) const) {
  int subpool = 0;
  while (panel >= (weights.*range)(subpool).end) ++subpool;
  return subpool;
}

std::vector<double> expert_output(const LayerConfig& config, const ExpertWeights& weights, int expert,
                                  const std::vector<double>& x) {
  const auto gate_up_panel = [&](int panel, int which) {
    const int subpool = subpool_with(weights, panel, &ExpertWeights::gate_up_panels);
    const int local = panel - weights.gate_up_panels(subpool).begin;
    return weights.gate_up(subpool, expert) + (2 * local + which) * weights.gate_up_layout().panel_bytes;
  };
  std::vector<double> h(config.shape.intermediate);
  for (int i = 0; i < config.shape.intermediate; ++i) {
    const double gate =
        row_times(weights, weights.gate_up_layout(), x, i, [&](int panel) { return gate_up_panel(panel, 0); });
    const double up =
        row_times(weights, weights.gate_up_layout(), x, i, [&](int panel) { return gate_up_panel(panel, 1); });
    h[i] = gated(gate, up, config);
  }
  std::vector<double> out(config.shape.hidden);
  for (int i = 0; i < config.shape.hidden; ++i) {
    out[i] = row_times(weights, weights.down_layout(), h, i, [&](int panel) {
      const int subpool = subpool_with(weights, panel, &ExpertWeights::down_panels);
      const int local = panel - weights.down_panels(subpool).begin;
      return weights.down(subpool, expert) + local * weights.down_layout().panel_bytes;
    });
  }
  return out;
}

}  // namespace

void reference_forward(const LayerConfig& config, const KernelSet& kernels, const ExpertWeights& weights,
                       const Routing& routing, const ForwardArgs& args) {
  const int hidden = config.shape.hidden;
  const size_t in_bytes = args.hidden_type == DType::kF32 ? 4 : 2;
  const size_t out_bytes = args.output_type == DType::kF32 ? 4 : 2;
  std::vector<std::vector<double>> sums(args.routing.tokens, std::vector<double>(hidden, 0.0));
  std::vector<float> row(hidden);
  std::vector<uint16_t> rounded(hidden);
  for (const ActiveExpert& expert : routing.experts()) {
    for (int p = expert.first_pair; p < expert.first_pair + expert.pairs; ++p) {
      const int token = routing.token_of_pair()[p];
      const uint8_t* from = static_cast<const uint8_t*>(args.hidden) + static_cast<size_t>(token) * hidden * in_bytes;
      kernels.rows->widen_rows[static_cast<int>(args.hidden_type)](from, row.data(), hidden);
      kernels.rows->store_rows[static_cast<int>(DType::kBf16)](row.data(), rounded.data(), hidden);
      std::vector<double> x(hidden);
      std::transform(rounded.begin(), rounded.end(), x.begin(), from_bf16);
      const std::vector<double> y = expert_output(config, weights, expert.expert, x);
      for (int i = 0; i < hidden; ++i) sums[token][i] += routing.weight_of_pair()[p] * y[i];
    }
  }
  for (int t = 0; t < args.routing.tokens; ++t) {
    uint8_t* out = static_cast<uint8_t*>(args.output) + static_cast<size_t>(t) * hidden * out_bytes;
    std::fill(row.begin(), row.end(), 0.0f);
    if (args.store == Store::kAccumulate) {
      kernels.rows->widen_rows[static_cast<int>(args.output_type)](out, row.data(), hidden);
    }
    for (int i = 0; i < hidden; ++i) row[i] = static_cast<float>(row[i] + sums[t][i]);
    kernels.rows->store_rows[static_cast<int>(args.output_type)](row.data(), out, hidden);
  }
}

}  // namespace kt
