// Formats of GGUF types that panels hold as integers and scales of their own (formats/gguf_panel.h); the codes of all
// of them come from the file's blocks (formats/gguf/).
//
//   name     codes       scales      columns of a scale   number of (n, k)
//   Q8_0     int8        kF16        32                   q * d
//   Q4_0     code4       kF16        32                   (q - 8) * d
//   Q4_1     code4       kF16Min     32                   q * d + m
//   Q5_0     code5       kF16        32                   (q - 16) * d
//   Q5_1     code5       kF16Min     32                   q * d + m
//   Q2_K     code2       kSuperMin4  16                   q * (d * s) - e * m
//   Q3_K     code3       kSuper      16                   (q - 4) * (d * s)
//   Q4_K     code4       kSuperMin   32                   q * (d * s) - e * m
//   Q5_K     code5       kSuperMin   32                   q * (d * s) - e * m
//   Q6_K     code6       kSuper      16                   (q - 32) * (d * s)
//   IQ4_NL   code4 wide  kF16        32                   table[q] * d
//   IQ4_XS   code4 wide  kSuper      32                   table[q] * (d * s)
//   MXFP4    code4       kE8m0       32                   e2m1(q) * 2^(b - 127)
//
// Exact: codes and both levels of scales are kept as they are. Padding: 0.
#pragma once

#include <vector>

#include "formats/format.h"

namespace kt {

const std::vector<const Format*>& gguf_panel_formats();

}  // namespace kt
