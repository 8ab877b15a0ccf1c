// Formats of symmetric integers with fp32 scales, made by scripts/convert_cpu_weights.py. MOE_INT* are other names of
// AMXINT*; all run on every CPU.
//
//   method   code                                 weight of (n, k)             checkpoint codes     scales
//   AMXINT4  offset int (formats/codes/code4.h)   (q[n, k] - 8) * s[n, k / g]  bytes [N, K/2]       fp32 [N, K/g]
//   AMXINT8  int8 (formats/codes/int8.h)          q[n, k] * s[n, k / g]        int8 [N, K]          fp32 [N, K/g]
//
// Codes lie within +-7 and +-127. Padding: the code of zero, scale 0. Exact: codes and scales are kept as they are.
#pragma once

#include "formats/code4.h"
#include "formats/format.h"

namespace kt {

constexpr Format kFormatAmxInt4 = {"AMXINT4", CodeType::kCode4, &kOffsetInt4,    Order::kRowMajor, 2,
                                   1,         kGroupOption,     ScaleType::kF32, ScaleType::kNone};

constexpr Format kFormatAmxInt8 = {"AMXINT8", CodeType::kInt8, nullptr,         Order::kRowMajor, 1,
                                   1,         kGroupOption,    ScaleType::kF32, ScaleType::kNone};

constexpr Format kFormatMoeInt4 = {"MOE_INT4", CodeType::kCode4, &kOffsetInt4,    Order::kRowMajor, 2,
                                   1,          kGroupOption,     ScaleType::kF32, ScaleType::kNone};

constexpr Format kFormatMoeInt8 = {"MOE_INT8", CodeType::kInt8, nullptr,         Order::kRowMajor, 1,
                                   1,          kGroupOption,    ScaleType::kF32, ScaleType::kNone};

}  // namespace kt
