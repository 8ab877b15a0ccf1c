// The next token of each request (doc/operators.md).
#include "kernels/sampling.h"

#include <cmath>
#include <stdexcept>

#include "operators/registry.h"
#include "operators/rows.h"
#include "operators/token_choice.h"

namespace kt {
namespace {

const SamplingKernels& kernels() {
  static const SamplingKernels& chosen =
      first_active<SamplingKernels>({{kAvx512Features, &kSamplingAvx512}, {kAvx2Features, &kSamplingAvx2}});
  return chosen;
}

void require_one_per_row(const TensorView& values, ElementType type, int64_t rows, const char* name) {
  if (values.type != type || values.elements() != rows || values.dims < 1 || (rows > 1 && values.stride(0) != 1)) {
    throw std::invalid_argument(std::string(name) + " of sample is " + values.text() + "; expected one for each of " +
                                std::to_string(rows) + " rows of logits, side by side");
  }
}

// logits [rows, tokens] fp32 -> ids [rows] int32
void sample(Call& call) {
  const TensorView logits = call.tensor(0), temperatures = call.tensor(1), top_ks = call.tensor(2);
  const TensorView top_ps = call.tensor(3), min_ps = call.tensor(4), uniform = call.tensor(5);
  const MatrixView rows = matrix_view(logits, "logits");
  if (logits.type != ElementType::kF32 || rows.columns < 1 || rows.columns > INT32_MAX) {
    throw std::invalid_argument("logits of sample are " + logits.text() + "; expected float32, [rows, tokens]");
  }
  require_one_per_row(temperatures, ElementType::kF32, rows.rows, "temperatures");
  require_one_per_row(top_ks, ElementType::kI32, rows.rows, "top_ks");
  require_one_per_row(top_ps, ElementType::kF32, rows.rows, "top_ps");
  require_one_per_row(min_ps, ElementType::kF32, rows.rows, "min_ps");
  require_one_per_row(uniform, ElementType::kF64, rows.rows, "uniform");
  const TensorView ids = call.result(ElementType::kI32, {rows.rows});
  const MatrixView weights = matrix_view(call.workspace(ElementType::kF32, {rows.rows, rows.columns}), "weights");
  call.run([=](Engine& engine) {
    const int count = static_cast<int>(rows.columns);
    share_rows(engine, rows.rows, rows.columns, [&](int64_t first, int64_t several) {
      for (int64_t i = first; i < first + several; ++i) {
        float* const row = reinterpret_cast<float*>(weights.row(i));
        kernels().weigh(reinterpret_cast<const float*>(rows.row(i)), row, count, temperatures.as<float>()[i]);
        const TokenFilter filter{top_ks.as<int32_t>()[i], top_ps.as<float>()[i], min_ps.as<float>()[i]};
        ids.as<int32_t>()[i] = static_cast<int32_t>(draw_token(row, count, filter, uniform.as<double>()[i]));
      }
    });
  });
}

}  // namespace

std::vector<Operator> sampling_operators() {
  return {
      {"kt_kernel::sample(Tensor logits, Tensor temperatures, Tensor top_ks, Tensor top_ps, Tensor min_ps, Tensor "
       "uniform) -> Tensor",
       sample}};
}

}  // namespace kt
