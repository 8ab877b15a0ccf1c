// Register-blocked panel GEMM for vector units, compiled once per instruction set and code type (no include guard: each
// including file instantiates it in its own anonymous namespace with its own `Ops` and `Codes`).
//
// Ops provides, for vectors of kLanes fp32:
//   Vec, Element (activation element), Weights (kLanes output rows x one pair of columns)
//   zero(), set(float), load(const float*), store(float*, Vec), mul, fma, from_bf16 and the like for scales
//   load_weights, store_weights                 to and from scratch
//   dot(Vec acc, Weights, const Element* pair)  acc + w[k] * a[k] + w[k+1] * a[k+1], in an order of its own
//   kWidens                                     Weights are wider than pairs of bf16
//   kTileTokens, kTileVecs                      register tile for many tokens
//   kShortStepTokens                            tokens of a tile that keeps totals in registers, 0 = too few of them
//   kFewTokens, kFewVectors                     up to so many tokens without scratch; sums side by side then
// Codes (codes-inl.h, e4m3*-inl.h) turns one vector of stored codes, a slice, into Weights.
//
// Both ways below do the same arithmetic in the same order.

#include "kernels/panel-inl.h"

#include "kernels/few-inl.h"

#include "kernels/tiles-inl.h"

template <class Ops, class Codes>
struct PanelGemm {
  static void run(const kt::GemmArgs& g) {
    if (g.tokens <= Ops::kFewTokens) {
      FewTokens<Ops, Codes>::run(g);
    } else {
      ManyTokens<Ops, Codes>::run(g);
    }
    if constexpr (Codes::kScaled) Panel<Ops, Codes>::spread_nan(g);
  }
};
