// Linear layers: SGLang's packed weights, and layers of any format that Python made.
#include "linear/linear.h"

#include <cstring>
#include <stdexcept>

#include "formats/bf16.h"
#include "formats/f32.h"
#include "operators/handles.h"
#include "operators/packed.h"
#include "operators/registry.h"

namespace kt {
namespace {

// Matrices of [B, N, K], each made longer by zeros so that the next one begins at a panel.
std::vector<uint8_t> with_whole_panels(const TensorView& weight, int64_t rows) {
  const int64_t bytes = weight.size(1) * weight.size(2) * static_cast<int64_t>(bytes_of(weight.type));
  const int64_t padded = rows * weight.size(2) * static_cast<int64_t>(bytes_of(weight.type));
  std::vector<uint8_t> matrices(weight.size(0) * padded);
  for (int64_t b = 0; b < weight.size(0); ++b) {
    std::memcpy(matrices.data() + b * padded, weight.bytes() + b * bytes, bytes);
  }
  return matrices;
}

const Format* format_of(ElementType type) {
  if (type == ElementType::kBf16) return &kFormatBf16;
  return type == ElementType::kF32 ? &kFormatF32 : nullptr;
}

// weight [N, K], or [B, N, K] for B matrices one below the other (Linear::forward_batch).
void convert_weight_packed(Call& call) {
  const TensorView weight = call.tensor(0);
  const bool contiguous = weight.dims >= 2 && weight.stride(-1) == 1 && weight.stride(-2) == weight.size(-1) &&
                          (weight.dims == 2 || weight.stride(0) == weight.size(1) * weight.size(2));
  const Format* const format = format_of(weight.type);
  if (format == nullptr || weight.dims < 2 || weight.dims > 3 || !contiguous) {
    throw std::invalid_argument("convert_weight_packed got " + weight.text() +
                                "; expected contiguous bfloat16 or float32 [N, K] or [B, N, K]");
  }
  const int64_t matrices = weight.dims == 3 ? weight.size(0) : 1;
  const int64_t rows = weight.dims == 3 ? (weight.size(1) + kPanelRows - 1) / kPanelRows * kPanelRows : weight.size(0);
  std::vector<uint8_t> padded;
  if (weight.dims == 3 && rows != weight.size(1)) padded = with_whole_panels(weight, rows);
  const uint8_t* const numbers = padded.empty() ? weight.bytes() : padded.data();
  const LinearPart part = {format, {}, static_cast<int>(matrices * rows), {numbers, nullptr, 1}};
  auto linear = std::make_shared<Linear>(shared_operator_engine(), static_cast<int>(weight.size(-1)),
                                         std::vector<LinearPart>{part}, Activations::kBf16);
  call.result(packed_tensor(std::move(linear), weight));
}

void multiply(Call& call, std::shared_ptr<Linear> linear, const TensorView& x, const TensorView& bias,
              ElementType type) {
  if (x.dims < 1 || x.dims >= kMaxDims) {
    throw std::invalid_argument("a linear layer got " + x.text() + "; expected [.., K]");
  }
  std::array<int64_t, kMaxDims> sizes = x.sizes;
  sizes[x.dims - 1] = linear->rows();
  const TensorView out = call.result(type, sizes.data(), x.dims);
  if (bias.given() && (bias.type != ElementType::kF32 || bias.elements() != linear->rows())) {
    throw std::invalid_argument("the bias of a linear layer is " + bias.text() + "; expected float32 [" +
                                std::to_string(linear->rows()) + "]");
  }
  const MatrixView from = matrix_view(x, "the input of a linear layer");
  const MatrixView to = matrix_view(out, "the output of a linear layer");
  call.run([=](Engine&) { linear->forward(from, to, bias.as<float>()); });
}

void weight_packed_linear(Call& call) {
  const TensorView x = call.tensor(0), weight = call.tensor(1);
  multiply(call, require_packed(weight, "mat2"), x, call.optional_tensor(2),
           gives_sums(weight) ? ElementType::kF32 : x.type);
}

void give_sums(Call& call) { kt::give_sums(call.tensor(0)); }

void packed_weight(Call& call) {
  std::shared_ptr<Linear> linear = Handles<Linear>::find(call.integer(0));
  const TensorView like = call.tensor(1);
  if (like.dims != 2 || like.size(0) != linear->rows() || like.size(1) != linear->k()) {
    throw std::invalid_argument("packed_weight got " + like.text() + " for a layer of " +
                                std::to_string(linear->rows()) + " x " + std::to_string(linear->k()));
  }
  call.result(packed_tensor(std::move(linear), like));
}

void linear(Call& call) {
  const TensorView x = call.tensor(1);
  multiply(call, Handles<Linear>::find(call.integer(0)), x, call.optional_tensor(2), x.type);
}

}  // namespace

std::vector<Operator> linear_operators() {
  return {
      {"sgl_kernel::convert_weight_packed(Tensor weight) -> Tensor", convert_weight_packed},
      {"sgl_kernel::weight_packed_linear(Tensor mat1, Tensor mat2, Tensor? bias, bool is_vnni) -> Tensor",
       weight_packed_linear},
      // Products with this packed weight are float32 from now on.
      {"kt_kernel::give_sums(Tensor weight) -> ()", give_sums},
      // `layer`: Linear.handle; x [.., K]; bias float32 [N]; -> [.., N] of x's type
      {"kt_kernel::linear(int layer, Tensor x, Tensor? bias) -> Tensor", linear},
      // `layer`: Linear.handle; -> what convert_weight_packed makes, of the shape and type of `like` [N, K]. Its memory
      // is the layer's, smaller than the shape says: only operators may read it.
      {"kt_kernel::packed_weight(int layer, Tensor like) -> Tensor", packed_weight},
  };
}

}  // namespace kt
