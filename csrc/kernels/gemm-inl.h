// Register-blocked panel GEMM for vector units, compiled once per instruction set and code type (no include guard: each
// including file instantiates it in its own anonymous namespace with its own `Ops` and `Codes`).
//
// Ops provides, for vectors of kLanes fp32:
//   Vec, Element (of the activations), Weights (kLanes output rows x kDotK columns), Sum (of one step)
//   zero(), set(float), load(const float*), store(float*, Vec), mul, fma, from_bf16 and the like for scales
//   load_weights, store_weights                 to and from scratch
//   dot(Sum, Weights, const Element* a)         adds the products of kDotK columns, in an order of its own
//   kInteger                                    activations are int8: sums are exact, each has a RowGroup
//   open(group) -> Sum, close(Sum) -> Vec       kInteger: a sum before its first product, and as fp32
//   kWidens                                     Weights are wider than the stored codes
//   kByColumn, load_column<0 or 1>              tiles multiply the columns of a pair one by one (kDotK = 2, in fp32)
//   kTileTokens, kTileVecs                      register tile for many tokens
//   kShortStepTokens                            tokens of a tile that keeps totals in registers, 0 = too few of them
//   kSumTokens                                  of one whose steps have several sums (int8 activations)
//   kDotsAtOnce                                 dots of each vector in a turn of a tile's innermost loop
//   kFewTokens, kFewVectors                     up to so many tokens without scratch; sums side by side then
// Codes (codes-inl.h, e4m3*-inl.h, integer_codes*-inl.h) turns one vector of stored codes, a slice, into Weights, and
// lists the Scales (scales-inl.h) that may stand beside them.
//
// Few and many tokens do the same arithmetic in the same order.

#include "kernels/panel-inl.h"

#include "kernels/few-inl.h"

#include "kernels/tiles-inl.h"

template <class Ops, class Codes>
struct PanelGemm {
  using P = Panel<Ops, Codes>;

  static size_t scratch_bytes(int, int) { return ManyTokens<Ops, Codes>::kScratchBytes; }

  static void few(const kt::GemmArgs& g) {
    Codes::ScaleTypes::template call<Ops>(g.layout->scale_type,
                                          [&](auto scales) { FewTokens<Ops, Codes, decltype(scales)>::run(g); });
    finish(g);
  }

  static void many(const kt::GemmArgs& g) {
    Codes::ScaleTypes::template call<Ops>(g.layout->scale_type,
                                          [&](auto scales) { ManyTokens<Ops, Codes>::run(g, decltype(scales)()); });
    finish(g);
  }

  static void any(const kt::GemmArgs& g) { g.tokens <= Ops::kFewTokens ? few(g) : many(g); }

 private:
  static void finish(const kt::GemmArgs& g) {
    if constexpr (Codes::kScaled) P::spread_nan(g);
  }
};

// Where codes are decoded, many tokens wait for a block's codes before its tiles, few do not, and their second call
// finds the panels in L2. (Zen 4, 1 thread, cold panels of K = 2048, 2026-11-30, GB/s with one call of `many` / two of
// `few`: AVX512-VNNI, 5 tokens, Q4_K 4.7 / 11.1, Q8_0 9.8 / 13.3, 8 tokens 5.7 / 9.5, 7.1 / 11.2; AVX2, 4 tokens 4.5
// / 5.9, 4.7 / 8.4; FP8 with bf16 activations, 8 tokens 2.2 / 6.0. Four calls for 16 tokens are no faster.)
template <class Codes>
constexpr int kFewCalls = Codes::kScaled ? 2 : 1;

// The usual set: both ways of one pair of Ops and Codes.
template <class Ops, class Codes>
constexpr kt::KernelSet kernel_set(const char* name, const kt::RowKernels* rows) {
  using Gemm = PanelGemm<Ops, Codes>;
  return {name,          Ops::kActivation,    Ops::kFewTokens,    Gemm::few, Gemm::many,
          kt::kBlocking, Gemm::scratch_bytes, Codes::kPrepareRow, rows,      kFewCalls<Codes>};
}
