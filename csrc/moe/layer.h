// One MoE layer on the CPU: packed weights and the forward pass.
//
//   out[t] = sum over the token's experts e of w[t, e] * down_e( act(gate_e x_t) * up_e x_t )
//
// where each matrix may add a bias to its product.
//
// Two phases, one after the other: SwiGLU outputs of every (token, expert) pair, then strips of hidden columns, each
// strip summed over all experts by one thread in ascending expert order. See doc/architecture.md.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "moe/engine.h"
#include "moe/layer_adapter.h"
#include "moe/routing.h"
#include "moe/weights.h"

namespace kt {

// Formats of an expert's matrices.
using ExpertFormats = PerProjection<const Format*>;

struct LayerConfig {
  std::string method;
  LayerShape shape;
  int top_k;
  int max_tokens;
  int layer_idx;
  float swiglu_limit;  // 0 = none
  float swiglu_alpha;  // 0 = SiLU
  Activations activations = Activations::kAuto;
};

struct ForwardArgs {
  RoutingInput routing;
  const void* hidden;  // [tokens, hidden]
  DType hidden_type;
  void* output;  // [tokens, hidden]
  DType output_type;
  Store store;  // kAccumulate adds what `output` holds
  Caller caller = Caller::kCpu;
};

class MoeLayer {
 public:
  MoeLayer(std::shared_ptr<Engine> engine, const LayerConfig& config);

  // Packs the experts of all slots. Throws std::invalid_argument for missing matrices, formats of other methods or
  // without kernels for the activations, and impossible shapes.
  void load(const ExpertSources& sources, const ExpertFormats& formats, const FormatOptions& options);
  // Uses blocks where they lie, as long as this layer has them. Throws as load, and for what ExpertWeights::borrow
  // refuses.
  void borrow(const ExpertSources& sources, const ExpertFormats& formats);
  // Moves the loaded experts into an open file, for `attach` of other processes with the same configuration and pools.
  // Throws as ExpertWeights::in_file.
  void share(int file);
  // Throws std::invalid_argument as load and as ExpertWeights::attach.
  void attach(int file, const ExpertFormats& formats, const FormatOptions& options);
  bool loaded() const { return std::atomic_load(&weights_) != nullptr; }
  size_t weight_bytes() const {
    const auto weights = std::atomic_load(&weights_);
    return weights ? weights->bytes() : 0;
  }
  // Names of the kernels in use, each once; empty as long as that depends on the weights.
  std::vector<std::string> kernels() const;
  // The format of a method that has one. Throws std::invalid_argument for other methods.
  const Format& only_format() const;
  const LayerConfig& config() const { return config_; }
  // Throws std::runtime_error before they are loaded.
  std::shared_ptr<const ExpertWeights> require_weights() const;
  Engine& engine() { return *engine_; }

  // Of each expert: the tokens that calls of this layer gave it since it was made; also while one computes.
  std::vector<uint64_t> expert_uses() const;

  // uint8[num_experts], non-zero = the expert lives on the device; read anew by every forward; null = none does.
  void set_device_mask(const uint8_t* mask) { device_mask_ = mask; }
  const uint8_t* device_mask() const { return device_mask_; }

  // What changes the experts in every call from the next on; null = nothing does. The caller holds the engine.
  void set_adapter(std::shared_ptr<LayerAdapter> adapter) { adapter_ = std::move(adapter); }

  // Throws std::invalid_argument for arguments that do not fit the layer, before anything is written.
  void check(const ForwardArgs& args) const;
  // Computes on the calling thread and the pool.
  void forward(const ForwardArgs& args);
  // Throws std::invalid_argument unless `expert` exists and can be split over `ranks`.
  void check_write(int expert, int ranks) const;
  // Writes one expert back in checkpoint layout: on the calling thread and the pool, or on the calling thread alone
  // while another call computes, so that neither waits for the other.
  void write(int expert, const RankTargets& targets);
  // The same result from the slow twin (moe/reference.h), on the calling thread.
  void forward_reference(const ForwardArgs& args);

 private:
  PerProjection<Served> served_formats(const ExpertFormats& formats) const;
  std::shared_ptr<ExpertWeights> weights_of(const ExpertSources& sources, const PerProjection<Served>& served,
                                            const FormatOptions& options) const;

  std::shared_ptr<Engine> engine_;
  LayerConfig config_;
  const std::vector<const Format*> formats_;      // of the method
  std::shared_ptr<const ExpertWeights> weights_;  // replaced as a whole, also while another thread checks a call
  const uint8_t* device_mask_ = nullptr;
  std::shared_ptr<LayerAdapter> adapter_;
  Routing routing_;
  std::vector<std::atomic<uint64_t>> uses_;  // of each expert
};

}  // namespace kt
