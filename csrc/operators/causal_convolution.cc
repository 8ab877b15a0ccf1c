// The short causal convolution in front of the gated delta rule: each channel's last `width` inputs, weighted.
//
// A request keeps its last width - 1 inputs in conv_states[slot] ([channels, width - 1], of which our memory order is
// [width - 1, channels]). A piece of work is one request and kChannels channels: it takes their window out of the
// state, runs all tokens, and puts the new window back.
#include <algorithm>
#include <cstring>

#include "operators/registry.h"
#include "operators/sequences.h"

namespace kt {
namespace {

constexpr int kChannels = 512;
constexpr int kMostDrafts = 128;

// What both operators share. `weight` is packed: [width, channels] in memory, [channels, width] by its shape.
struct Convolution {
  TensorView weight, bias, states, slots;
  int64_t pad_slot;
  AfterConvolution then;
  int type, state_type;

  int channels() const { return static_cast<int>(weight.size(0)); }
  int width() const { return static_cast<int>(weight.size(1)); }
  int blocks() const { return (channels() + kChannels - 1) / kChannels; }
  int64_t multiply_adds(int64_t tokens) const { return tokens * channels() * (width() + 12); }
  int64_t slot(int request) const { return index_at(slots, request); }
  bool is_left_out(int request) const { return slot(request) == pad_slot || slot(request) < 0; }
};

// kChannels channels of one request: the window of the state in fp32, and the convolution of a token.
class Block {
 public:
  Block(const Convolution& shared, int request, int block)
      : shared_(shared), first_(block * kChannels), count_(std::min(kChannels, shared.channels() - first_)) {
    state_ = address(shared.states, shared.slot(request) * shared.states.stride(0) + first_);
  }

  int first() const { return first_; }
  int count() const { return count_; }

  void load_window() {
    for (int i = 0; i < shared_.width() - 1; ++i) kernels_.widen[shared_.state_type](state_row(i), window_[i], count_);
  }
  void no_window() { has_window_ = false; }

  // The state moves on by `tokens` inputs, the last of which are rows[0], rows[1] .. (at most width - 1 of them).
  template <class Row>
  void store_window(int64_t tokens, const Row& row) {
    const int length = shared_.width() - 1;
    float widened[kChannels];
    for (int i = 0; i < length; ++i) {
      const int64_t token = tokens - length + i;  // negative: from the window
      const float* from = widened;
      if (token >= 0) {
        kernels_.widen[shared_.type](row(token), widened, count_);
      } else if (has_window_) {
        from = window_[length + token];
      } else {
        std::fill_n(widened, count_, 0.0f);
      }
      kernels_.narrow[shared_.state_type](from, state_row(i), count_);
    }
  }

  // The input `back` tokens before the request's first: 1 is the newest. Null: zeros.
  const float* window(int64_t back) const { return has_window_ ? window_[shared_.width() - 1 - back] : nullptr; }

  // `inputs`: how many of the last rows are activations.
  void convolve(const void* const* rows, int inputs, void* out) const {
    ConvolutionArgs args{};
    args.taps = shared_.width();
    args.channels = count_;
    args.first_activation = args.taps - inputs;
    std::copy_n(rows, args.taps, args.rows);
    args.weight = address(shared_.weight, first_);
    args.weight_stride = shared_.channels();
    args.bias = shared_.bias.given() ? shared_.bias.as<float>() + first_ : nullptr;
    args.then = shared_.then;
    args.out = out;
    kernels_.convolve[shared_.type](args);
  }

 private:
  uint8_t* state_row(int i) const { return state_ + i * shared_.states.stride(2) * bytes_of(shared_.states.type); }

  const GatedDeltaKernels& kernels_ = gated_delta_kernels();
  const Convolution& shared_;
  int first_, count_;
  uint8_t* state_;
  bool has_window_ = true;
  float window_[kMostTaps - 1][kChannels];
};

void pack_weight(Call& call) {
  const TensorView weight = call.tensor(0);
  require(weight.dims == 2, "the weight of a convolution", weight, "[channels, width]");
  const TensorView packed = call.result(weight.type, {weight.size(0), weight.size(1)});
  const size_t bytes = bytes_of(weight.type);
  for (int64_t tap = 0; tap < weight.size(1); ++tap) {
    for (int64_t c = 0; c < weight.size(0); ++c) {
      std::memcpy(address(packed, tap * weight.size(0) + c),
                  address(weight, c * weight.stride(0) + tap * weight.stride(1)), bytes);
    }
  }
}

Convolution convolution(const TensorView& x, const TensorView& weight, const TensorView& bias, const TensorView& states,
                        const TensorView& slots, bool silu, int64_t pad_slot, bool packed) {
  require(packed && weight.dims == 2 && weight.stride(1) == 1 && weight.stride(0) == weight.size(1), "the weight",
          weight, "what causal_conv1d_weight_pack gives");
  require(weight.type == x.type, "the weight", weight, "the type of the input");
  require(weight.size(1) >= 2 && weight.size(1) <= kMostTaps, "the weight", weight, "2 to 8 inputs a channel");
  require(!bias.given() || (bias.type == ElementType::kF32 && bias.elements() == weight.size(0)), "the bias", bias,
          "float32 [channels]");
  require(states.dims == 3 && states.size(1) == weight.size(0) && states.size(2) >= weight.size(1) - 1 &&
              states.stride(1) == 1,
          "conv_states", states, "[slots, channels, width - 1] with channels side by side");
  require_indices(slots, "the states' indices");
  Convolution shared{weight, bias, states, slots, pad_slot, silu ? AfterConvolution::kSilu : AfterConvolution::kNothing,
                     0,      0};
  shared.type = activation_type(x, "the input");
  shared.state_type = activation_type(states, "conv_states");
  return shared;
}

// One request's tokens, row by row.
void convolve_prompt(const Convolution& shared, Block& block, const TensorView& x, const TensorView& out, int64_t begin,
                     int64_t end) {
  const auto input = [&](int64_t token) { return address(x, (begin + token) * x.stride(0) + block.first()); };
  const int taps = shared.width();
  for (int64_t token = 0; token < end - begin; ++token) {
    const void* rows[kMostTaps];
    for (int tap = 0; tap < taps; ++tap) {
      const int64_t at = token - (taps - 1) + tap;
      rows[tap] = at >= 0 ? static_cast<const void*>(input(at)) : block.window(-at);
    }
    const int inputs = static_cast<int>(std::min<int64_t>(taps, token + 1));
    block.convolve(rows, inputs, address(out, (begin + token) * shared.channels() + block.first()));
  }
  block.store_window(end - begin, input);
}

// x [tokens, channels] of all requests -> the same.
void prompt(Call& call) {
  const TensorView x = call.tensor(0), starts = call.tensor(4), has_state = call.optional_tensor(6);
  const Convolution shared = convolution(x, call.tensor(1), call.optional_tensor(2), call.tensor(3), call.tensor(5),
                                         call.flag(7), call.integer(8), call.flag(9));
  require(x.dims == 2 && x.size(1) == shared.channels() && x.stride(1) == 1, "the input", x,
          "[tokens, channels] with channels side by side");
  require_indices(starts, "query_start_loc");
  require(starts.size(0) == shared.slots.size(0) + 1, "query_start_loc", starts, "one more than requests");
  require(!has_state.given() || has_state.type == ElementType::kBool, "has_initial_state", has_state, "bool");
  const int64_t tokens = x.size(0);
  const TensorView out = call.result(x.type, {tokens, x.size(1)});
  call.run([=](Engine& engine) {
    const size_t row_bytes = shared.channels() * bytes_of(x.type);
    const int requests = static_cast<int>(shared.slots.size(0));
    const auto clear = [&](int64_t from, int64_t to) {
      std::fill_n(out.bytes() + from * row_bytes, (to - from) * row_bytes, uint8_t{0});
    };
    clear(index_at(starts, requests), tokens);
    share_out(engine, requests * shared.blocks(), shared.multiply_adds(tokens), [&](int piece) {
      const int request = piece / shared.blocks();
      const int64_t begin = index_at(starts, request), end = index_at(starts, request + 1);
      if (begin == end) return;
      if (shared.is_left_out(request)) {
        if (piece % shared.blocks() == 0) clear(begin, end);
        return;
      }
      Block block(shared, request, piece % shared.blocks());
      if (!has_state.given() || has_state.as<bool>()[request * has_state.stride(0)]) {
        block.load_window();
      } else {
        block.no_window();
      }
      convolve_prompt(shared, block, x, out, begin, end);
    });
  });
}

// Drafts to be verified: the state stays, the window after each token is kept.
struct Drafts {
  TensorView windows;  // [slots, steps, channels, width - 1]; not given: the state moves on
  TensorView slots;
  TensorView next_token, next_sibling, parents;  // a tree of drafts; not given: a chain
};

// The parent of each token, -1 for the first: from first-child and next-sibling links.
void find_parents(const Drafts& drafts, int request, int steps, int* parents) {
  for (int t = 0; t < steps; ++t) parents[t] = t - 1;
  if (!drafts.parents.given()) return;
  const auto link = [&](const TensorView& links, int t) {
    const int64_t at = request * links.stride(0) + t * links.stride(1);
    return static_cast<int>(links.type == ElementType::kI32 ? links.as<int32_t>()[at] : links.as<int64_t>()[at]);
  };
  std::fill_n(parents, steps, -1);
  for (int t = 0; t < steps; ++t) {
    const int child = link(drafts.next_token, t), sibling = link(drafts.next_sibling, t);
    if (child >= 0 && child < steps) parents[child] = t;
    if (sibling >= 0 && sibling < steps) parents[sibling] = parents[t];
  }
}

void put_parents(const TensorView& to, int request, int steps, const int* parents) {
  for (int t = 0; t < steps; ++t) {
    const int64_t at = request * to.stride(0) + t * to.stride(1);
    const int parent = std::max(parents[t], 0);
    if (to.type == ElementType::kI32) {
      to.as<int32_t>()[at] = parent;
    } else {
      to.as<int64_t>()[at] = parent;
    }
  }
}

// The window after a token is its last width - 1 inputs; `windows` has them one beside the other in each channel.
void keep_window(const Convolution& shared, const Block& block, const TensorView& windows, int64_t slot, int step,
                 const void* const* rows, int inputs) {
  const int length = shared.width() - 1;
  const int kept_type = activation_type(windows, "intermediate_conv_window");
  const size_t bytes = bytes_of(windows.type);
  for (int i = 0; i < length; ++i) {
    float row[kChannels] = {};
    uint8_t narrowed[kChannels * sizeof(float)];
    if (i + 1 >= shared.width() - inputs) {
      gated_delta_kernels().widen[shared.type](rows[i + 1], row, block.count());
    } else if (rows[i + 1] != nullptr) {
      std::memcpy(row, rows[i + 1], block.count() * sizeof(float));
    }
    gated_delta_kernels().narrow[kept_type](row, narrowed, block.count());
    for (int c = 0; c < block.count(); ++c) {
      std::memcpy(address(windows, slot * windows.stride(0) + step * windows.stride(1) +
                                       (block.first() + c) * windows.stride(2) + i * windows.stride(3)),
                  narrowed + c * bytes, bytes);
    }
  }
}

// x [requests, channels] or [requests, steps, channels] -> the same.
struct Update {
  Convolution shared;
  Drafts drafts;
  TensorView x, out;

  int steps() const { return x.dims == 2 ? 1 : static_cast<int>(x.size(1)); }
  uint8_t* out_row(int request, int step) const {
    return address(out, (static_cast<int64_t>(request) * steps() + step) * shared.channels());
  }

  void compute(int request, int number) const {
    const size_t row_bytes = shared.channels() * bytes_of(x.type);
    if (shared.is_left_out(request)) {
      if (number == 0) std::fill_n(out_row(request, 0), steps() * row_bytes, uint8_t{0});
      return;
    }
    Block block(shared, request, number);
    block.load_window();
    const auto input = [&](int64_t step) {
      return address(x, request * x.stride(0) + (x.dims == 2 ? 0 : step * x.stride(1)) + block.first());
    };
    int parents[kMostDrafts];
    find_parents(drafts, request, steps(), parents);
    if (number == 0 && drafts.parents.given()) put_parents(drafts.parents, request, steps(), parents);
    for (int step = 0; step < steps(); ++step) {
      const void* rows[kMostTaps];
      int inputs = 0;
      for (int tap = shared.width() - 1, at = step; tap >= 0; --tap) {
        if (at >= 0) {
          rows[tap] = input(at);
          at = parents[at];
          ++inputs;
        } else {
          rows[tap] = block.window(shared.width() - tap - inputs);
        }
      }
      block.convolve(rows, inputs, out_row(request, step) + block.first() * bytes_of(x.type));
      if (drafts.windows.given()) {
        keep_window(shared, block, drafts.windows, index_at(drafts.slots, request), step, rows, inputs);
      }
    }
    if (!drafts.windows.given()) block.store_window(steps(), input);
  }
};

void update(Call& call) {
  Update u{};
  u.x = call.tensor(0);
  u.shared = convolution(u.x, call.tensor(2), call.optional_tensor(3), call.tensor(1), call.tensor(5), call.flag(4),
                         call.integer(6), call.flag(7));
  u.drafts = {call.optional_tensor(8), call.optional_tensor(9), call.optional_tensor(10), call.optional_tensor(11),
              call.optional_tensor(12)};
  require((u.x.dims == 2 || u.x.dims == 3) && u.x.size(-1) == u.shared.channels() && u.x.stride(-1) == 1 &&
              u.steps() <= kMostDrafts,
          "the input", u.x, "[requests, channels] or [requests, steps <= 128, channels] with channels side by side");
  require(u.shared.slots.size(0) == u.x.size(0), "the states' indices", u.shared.slots, "one a request");
  if (u.drafts.windows.given()) require_indices(u.drafts.slots, "intermediate_state_indices");
  if (u.drafts.parents.given()) {
    require(u.drafts.next_token.given() && u.drafts.next_sibling.given(), "retrieve_parent_token", u.drafts.parents,
            "retrieve_next_token and retrieve_next_sibling with it");
  }
  u.out = call.result(u.x.type, u.x.sizes.data(), u.x.dims);
  call.run([u](Engine& engine) {
    const int pieces = static_cast<int>(u.x.size(0)) * u.shared.blocks();
    share_out(engine, pieces, u.shared.multiply_adds(u.x.size(0) * u.steps()),
              [&](int piece) { u.compute(piece / u.shared.blocks(), piece % u.shared.blocks()); });
  });
}

}  // namespace

std::vector<Operator> causal_convolution_operators() {
  return {
      {"sgl_kernel::causal_conv1d_weight_pack(Tensor weight) -> Tensor", pack_weight},
      {"sgl_kernel::causal_conv1d_fwd_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_states, Tensor "
       "query_start_loc, Tensor cache_indices, Tensor? has_initial_state, bool silu_activation, int pad_slot_id, bool "
       "is_packed) -> Tensor",
       prompt},
      {"sgl_kernel::causal_conv1d_update_cpu(Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, bool "
       "silu_activation, Tensor conv_state_indices, int pad_slot_id, bool is_packed, Tensor(b!)? "
       "intermediate_conv_window=None, Tensor? intermediate_state_indices=None, Tensor? retrieve_next_token=None, "
       "Tensor? retrieve_next_sibling=None, Tensor(c!)? retrieve_parent_token=None) -> Tensor",
       update},
  };
}

}  // namespace kt
