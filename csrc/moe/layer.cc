#include "moe/layer.h"

#include <algorithm>
#include <chrono>
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

void require_matrices(const std::vector<MatrixSource>& matrices, const std::string& name, const Format& format) {
  for (size_t e = 0; e < matrices.size(); ++e) {
    const bool needs_scales = format.scales_apart();
    if (matrices[e].codes != nullptr && (!needs_scales || matrices[e].scales != nullptr)) continue;
    throw std::invalid_argument(name + " matrix of expert " + std::to_string(e) + " has a null pointer for its " +
                                (matrices[e].codes == nullptr ? "weights" : "scales") + "; expected an address");
  }
}

void require_format(const Format& format, const std::string& method) {
  if (method == format.method()) return;
  throw std::invalid_argument(std::string("format ") + format.name + " belongs to method " + format.method() +
                              ", not to the layer's method " + method);
}

template <class T>
void require_pointer(const T* pointer, const char* name) {
  if (pointer == nullptr) throw std::invalid_argument(std::string(name) + " is a null pointer; expected an address");
}

void fill_with_nothing(const ForwardArgs& args, int hidden) {
  if (args.store == Store::kAccumulate) return;
  const size_t bytes = args.output_type == DType::kF32 ? 4 : 2;
  std::memset(args.output, 0, static_cast<size_t>(args.routing.tokens) * hidden * bytes);
}

}  // namespace

MoeLayer::MoeLayer(std::shared_ptr<Engine> engine, const LayerConfig& config)
    : engine_(std::move(engine)),
      config_(config),
      formats_(formats_of_method(config.method)),
      uses_(std::max(config.shape.num_experts, 0)) {
  if (formats_.size() == 1) served(Operation::kForward, *formats_[0], config.activations);
  require_positive(config.shape.num_experts, "num_experts");
  require_positive(config.shape.hidden, "hidden");
  require_positive(config.shape.intermediate, "intermediate");
  require_positive(config.top_k, "top_k");
  require_positive(config.max_tokens, "max_tokens");
  require_swiglu_constant(config.swiglu_limit, "swiglu_limit");
  require_swiglu_constant(config.swiglu_alpha, "swiglu_alpha");
}

std::vector<std::string> MoeLayer::kernels() const {
  std::vector<std::string> names;
  const auto weights = std::atomic_load(&weights_);
  if (weights == nullptr) {
    if (formats_.size() > 1) return names;
    return {served(Operation::kForward, *formats_[0], config_.activations).kernels->name};
  }
  for (const Projection p : kProjections) {
    const char* name = weights->kernels(p).name;
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

const Format& MoeLayer::only_format() const {
  if (formats_.size() == 1) return *formats_[0];
  throw std::invalid_argument("method " + config_.method + " has " + std::to_string(formats_.size()) +
                              " formats; name the one of each matrix");
}

PerProjection<Served> MoeLayer::served_formats(const ExpertFormats& formats) const {
  PerProjection<Served> kept;
  for (const Projection p : kProjections) {
    require_format(*formats[p], config_.method);
    kept[p] = served(Operation::kForward, *formats[p], config_.activations);
  }
  return kept;
}

void MoeLayer::load(const ExpertSources& sources, const ExpertFormats& formats, const FormatOptions& options) {
  const PerProjection<Served> kept = served_formats(formats);
  const auto lock = engine_->exclusive();
  const auto weights = weights_of(sources, kept, options);
  weights->load(sources);
  std::atomic_store(&weights_, std::shared_ptr<const ExpertWeights>(weights));
}

void MoeLayer::share(int file) {
  const auto lock = engine_->exclusive();
  const auto weights = require_weights()->in_file(file);
  std::atomic_store(&weights_, std::shared_ptr<const ExpertWeights>(weights));
}

void MoeLayer::attach(int file, const ExpertFormats& formats, const FormatOptions& options) {
  const PerProjection<Served> kept = served_formats(formats);
  const auto lock = engine_->exclusive();
  const auto weights = std::make_shared<ExpertWeights>(kept, options, config_.shape, engine_->pools());
  weights->attach(file);
  std::atomic_store(&weights_, std::shared_ptr<const ExpertWeights>(weights));
}

void MoeLayer::borrow(const ExpertSources& sources, const ExpertFormats& formats) {
  PerProjection<Served> kept;
  for (const Projection p : kProjections) {
    require_format(*formats[p], config_.method);
    const Format& blocks = formats[p]->as_blocks != nullptr ? *formats[p]->as_blocks : *formats[p];
    kept[p] = served(Operation::kForward, blocks, config_.activations);
  }
  const auto lock = engine_->exclusive();
  const auto weights = weights_of(sources, kept, {});
  weights->borrow(sources);
  std::atomic_store(&weights_, std::shared_ptr<const ExpertWeights>(weights));
}

std::shared_ptr<ExpertWeights> MoeLayer::weights_of(const ExpertSources& sources, const PerProjection<Served>& served,
                                                    const FormatOptions& options) const {
  const size_t experts = config_.shape.num_experts;
  const auto count = [&](Projection p) { return sources[p].size(); };
  if (count(Projection::kGate) != experts || count(Projection::kUp) != experts || count(Projection::kDown) != experts) {
    throw std::invalid_argument("load got " + std::to_string(count(Projection::kGate)) + " gate, " +
                                std::to_string(count(Projection::kUp)) + " up and " +
                                std::to_string(count(Projection::kDown)) + " down matrices for " +
                                std::to_string(experts) + " experts; give one of each per expert");
  }
  for (const Projection p : kProjections) require_matrices(sources[p], name_of(p), *served[p].format);
  return std::make_shared<ExpertWeights>(served, options, config_.shape, engine_->pools());
}

std::shared_ptr<const ExpertWeights> MoeLayer::require_weights() const {
  auto weights = std::atomic_load(&weights_);
  if (weights != nullptr) return weights;
  throw std::runtime_error("layer " + std::to_string(config_.layer_idx) +
                           " has no weights yet; call load_weights or load_weights_from_tensors first");
}

void MoeLayer::check_write(int expert, int ranks) const {
  const auto weights = require_weights();
  if (expert < 0 || expert >= config_.shape.num_experts) {
    throw std::invalid_argument("expert " + std::to_string(expert) + " does not exist; this layer has experts 0 to " +
                                std::to_string(config_.shape.num_experts - 1));
  }
  require_positive(ranks, "the number of device ranks");
  weights->check_ranks(ranks);
}

void MoeLayer::write(int expert, const RankTargets& targets) {
  const auto weights = require_weights();
  const auto lock = engine_->exclusive_if_free();
  if (lock) {
    weights->write(expert, targets);
  } else {
    weights->write_alone(expert, targets);
  }
}

void MoeLayer::check(const ForwardArgs& args) const {
  require_weights();
  if (args.routing.tokens < 0 || args.routing.tokens > config_.max_tokens) {
    throw std::invalid_argument("got " + std::to_string(args.routing.tokens) + " tokens; this layer takes at most " +
                                std::to_string(config_.max_tokens) +
                                " per call (chunked_prefill_size); split the batch or raise the limit");
  }
  if (args.routing.top_k < 1 || args.routing.top_k > config_.shape.num_experts) {
    throw std::invalid_argument("got " + std::to_string(args.routing.top_k) + " experts per token; expected 1 to " +
                                std::to_string(config_.shape.num_experts));
  }
  if (args.routing.tokens == 0) return;
  require_pointer(static_cast<const uint8_t*>(args.hidden), "hidden");
  require_pointer(static_cast<const uint8_t*>(args.routing.ids), "ids");
  require_pointer(args.routing.weights, "weights");
  require_pointer(static_cast<const uint8_t*>(args.output), "output");
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
  for (const ActiveExpert& active : routing_.experts()) {
    uses_[active.expert].fetch_add(active.pairs, std::memory_order_relaxed);
  }
  const auto weights = require_weights();
  const auto begin = std::chrono::steady_clock::now();
  PassAdditions* const additions =
      adapter_ == nullptr ? nullptr
                          : &adapter_->additions(*engine_, *weights->kernels(Projection::kDown).rows, routing_, args);
  ForwardPass(*engine_, engine_->pass_buffers(), config_, *weights, weights->kernel_sets(), routing_, args, additions)
      .run();
  engine_->count_call(std::chrono::steady_clock::now() - begin,
                      routing_.experts().size() * weights->bytes_per_expert());
}

std::vector<uint64_t> MoeLayer::expert_uses() const {
  std::vector<uint64_t> uses;
  for (const auto& of_expert : uses_) uses.push_back(of_expert.load(std::memory_order_relaxed));
  return uses;
}

void MoeLayer::forward_reference(const ForwardArgs& args) {
  check(args);
  const auto lock = engine_->exclusive();
  routing_.group(args.routing, config_.shape.num_experts, device_mask_);
  reference_forward(config_, *require_weights(), adapter_.get(), routing_, args);
}

}  // namespace kt
