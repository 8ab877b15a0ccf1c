#include "moe/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "formats/numbers.h"

namespace kt {
namespace {

// Row `row` of a matrix times `x`, and its bias; the panels of a matrix may be shared out over sub-pools.
double row_times(const ExpertWeights& weights, Projection which, int expert, const std::vector<double>& x, int row) {
  const int index = row / kPanelRows;
  int subpool = 0;
  while (index >= weights.panels(which, subpool).end) ++subpool;
  const uint8_t* panel = weights.panel(which, subpool, expert, index - weights.panels(which, subpool).begin);
  const float* bias = weights.bias(which, expert, index);
  double sum = bias == nullptr ? 0 : bias[row % kPanelRows];
  for (size_t k = 0; k < x.size(); ++k) {
    sum += element(weights.format(which), weights.layout(which), panel, row % kPanelRows, static_cast<int>(k)) * x[k];
  }
  return sum;
}

double gated(double gate, double up, const LayerConfig& config) {
  const double limit = config.swiglu_limit;
  const double alpha = config.swiglu_alpha;
  if (limit > 0) {
    gate = std::min(gate, limit);
    up = std::clamp(up, -limit, limit);
  }
  if (alpha > 0) return gate / (1 + std::exp(-alpha * gate)) * (up + 1);
  return gate / (1 + std::exp(-gate)) * up;
}

// The first `rows` rows of a matrix times `x`, their biases, and what the adapter adds.
std::vector<double> product(const ExpertWeights& weights, const LayerAdapter* adapter, Projection which, int expert,
                            const std::vector<double>& x, int rows) {
  std::vector<double> added(rows);
  if (adapter != nullptr) added = adapter->product(which, expert, x);
  for (int i = 0; i < rows; ++i) added[i] += row_times(weights, which, expert, x, i);
  return added;
}

std::vector<double> expert_output(const LayerConfig& config, const ExpertWeights& weights, const LayerAdapter* adapter,
                                  int expert, const std::vector<double>& x) {
  const int intermediate = config.shape.intermediate;
  const std::vector<double> gate = product(weights, adapter, Projection::kGate, expert, x, intermediate);
  const std::vector<double> up = product(weights, adapter, Projection::kUp, expert, x, intermediate);
  std::vector<double> h(intermediate);
  for (int i = 0; i < intermediate; ++i) h[i] = gated(gate[i], up[i], config);
  return product(weights, adapter, Projection::kDown, expert, h, config.shape.hidden);
}

}  // namespace

void reference_forward(const LayerConfig& config, const ExpertWeights& weights, const LayerAdapter* adapter,
                       const Routing& routing, const ForwardArgs& args) {
  const RowKernels& rows = *weights.kernels(Projection::kDown).rows;
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
      rows.widen_rows[static_cast<int>(args.hidden_type)](from, row.data(), hidden);
      rows.store_rows[static_cast<int>(DType::kBf16)](row.data(), rounded.data(), hidden);
      std::vector<double> x(hidden);
      std::transform(rounded.begin(), rounded.end(), x.begin(), from_bf16);
      const std::vector<double> y = expert_output(config, weights, adapter, expert.expert, x);
      for (int i = 0; i < hidden; ++i) sums[token][i] += routing.weight_of_pair()[p] * y[i];
    }
  }
  for (int t = 0; t < args.routing.tokens; ++t) {
    uint8_t* out = static_cast<uint8_t*>(args.output) + static_cast<size_t>(t) * hidden * out_bytes;
    std::fill(row.begin(), row.end(), 0.0f);
    if (args.store == Store::kAccumulate) {
      rows.widen_rows[static_cast<int>(args.output_type)](out, row.data(), hidden);
    }
    for (int i = 0; i < hidden; ++i) row[i] = static_cast<float>(row[i] + sums[t][i]);
    rows.store_rows[static_cast<int>(args.output_type)](row.data(), out, hidden);
  }
}

}  // namespace kt
