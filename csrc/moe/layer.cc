#include "moe/layer.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "moe/forward_pass.h"
#include "moe/reference.h"

namespace kt {
namespace {

void require_positive(int value, const char* name) {
  if (value < 1) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; it must be at least 1");
  }
}

void require_swiglu_constant(float value, const char* name) {
  if (!(value >= 0) || std::isinf(value)) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                "; it must be a positive number, or 0 for none");
  }
}

void require_matrices(const std::vector<const uint16_t*>& matrices, const char* name) {
  for (size_t e = 0; e < matrices.size(); ++e) {
    if (matrices[e] != nullptr) continue;
    throw std::invalid_argument(std::string(name) + " matrix of expert " + std::to_string(e) +
                                " is a null pointer; expected the address of a row-major bf16 matrix");
  }
}

void fill_with_nothing(const ForwardArgs& args, int hidden) {
  if (args.store == Store::kAccumulate) return;
  const size_t bytes = args.output_type == DType::kF32 ? 4 : 2;
  std::memset(args.output, 0, static_cast<size_t>(args.routing.tokens) * hidden * bytes);
}

}  // namespace

MoeLayer::MoeLayer(std::shared_ptr<Engine> engine, const LayerConfig& config)
    : engine_(std::move(engine)), config_(config), kernels_(kernels_for(config.method)) {
  require_positive(config.shape.num_experts, "num_experts");
  require_positive(config.shape.hidden, "hidden");
  require_positive(config.shape.intermediate, "intermediate");
  require_positive(config.top_k, "top_k");
  require_positive(config.max_tokens, "max_tokens");
  require_swiglu_constant(config.swiglu_limit, "swiglu_limit");
  require_swiglu_constant(config.swiglu_alpha, "swiglu_alpha");
}

void MoeLayer::load_bf16(const std::vector<const uint16_t*>& gate, const std::vector<const uint16_t*>& up,
                         const std::vector<const uint16_t*>& down) {
  const size_t experts = config_.shape.num_experts;
  if (gate.size() != experts || up.size() != experts || down.size() != experts) {
    throw std::invalid_argument("load got " + std::to_string(gate.size()) + " gate, " + std::to_string(up.size()) +
                                " up and " + std::to_string(down.size()) + " down matrices for " +
                                std::to_string(experts) + " experts; give one of each per expert");
  }
  require_matrices(gate, "gate");
  require_matrices(up, "up");
  require_matrices(down, "down");
  const auto lock = engine_->exclusive();
  auto weights = std::make_unique<Bf16Weights>(config_.shape, engine_->pools());
  weights->load(gate, up, down);
  weights_ = std::move(weights);
}

void MoeLayer::check(const ForwardArgs& args) const {
  if (!loaded()) {
    throw std::runtime_error("layer " + std::to_string(config_.layer_idx) +
                             " has no weights yet; call load_weights or load_weights_from_tensors first");
  }
  if (args.routing.tokens < 0 || args.routing.tokens > config_.max_tokens) {
    throw std::invalid_argument("got " + std::to_string(args.routing.tokens) + " tokens; this layer takes at most " +
                                std::to_string(config_.max_tokens) +
                                " per call (chunked_prefill_size); split the batch or raise the limit");
  }
  if (args.routing.top_k < 1 || args.routing.top_k > config_.shape.num_experts) {
    throw std::invalid_argument("got " + std::to_string(args.routing.top_k) + " experts per token; expected 1 to " +
                                std::to_string(config_.shape.num_experts));
  }
}

void MoeLayer::forward(const ForwardArgs& args) {
  check(args);
  if (args.routing.tokens == 0) return;
  const auto lock = engine_->exclusive();
  routing_.group(args.routing, config_.shape.num_experts, device_mask_);
  if (routing_.pairs() == 0) {
    fill_with_nothing(args, config_.shape.hidden);
    return;
  }
  ForwardPass pass(*engine_, kernels_, config_, *weights_, routing_, args);
  engine_->pools().run(pass);
}

void MoeLayer::forward_reference(const ForwardArgs& args) {
  check(args);
  const auto lock = engine_->exclusive();
  routing_.group(args.routing, config_.shape.num_experts, device_mask_);
  reference_forward(config_, kernels_, *weights_, routing_, args);
}

}  // namespace kt
