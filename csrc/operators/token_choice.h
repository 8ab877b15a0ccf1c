// The draw of a token from weights, as far as filters leave them.
#pragma once

#include <cstdint>

namespace kt {

// Which tokens may be drawn. In descending order of weight, equal ones in ascending order of index, a token stays while
// fewer than `top_k` came before it and those before it have at most the share `top_p` of all weights; besides, its
// weight is at least `min_p` of the largest. (What SGLang's torch code means by the three: shares are of all tokens,
// not of those that another filter left.)
struct TokenFilter {
  int64_t top_k;
  double top_p;
  double min_p;
  bool keeps_all(int64_t tokens) const { return top_k >= tokens && top_p >= 1 && min_p <= 0; }
};

// An index with the probability weight / sum of the weights that stay, by inversion: the first in ascending order at
// which their sum exceeds `uniform` in [0, 1) of the whole. `weights` are in [0, 1] and the largest is 1, as
// SamplingKernels::weigh makes them of numbers; NaN among them means that the row's logits were none, and throws
// std::invalid_argument.
int64_t draw_token(const float* weights, int64_t count, const TokenFilter& filter, double uniform);

}  // namespace kt
