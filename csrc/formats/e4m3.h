// Formats of 8-bit codes, float8_e4m3fn (formats/codes/e4m3.h): they differ in their scales.
//
//   method          weight of (n, k)                      checkpoint scales
//   FP8             e4m3(q[n, k]) * s[n / 128, k / 128]   fp32 or bf16 [ceil(N/128), ceil(K/128)]
//   FP8_PERCHANNEL  e4m3(q[n, k]) * s[n]                  fp32, bf16 or fp16 [N]
//   MXFP8           e4m3(q[n, k]) * 2^(b[n, k/32] - 127)  bytes [N, K/32]  (OCP Microscaling formats 1.0, 2023)
//
// Scales in a panel: FP8 one fp32 per 128 columns (a panel lies in one block of 128 rows); FP8_PERCHANNEL 32 fp32;
// MXFP8 32 bytes per 32 columns. Padding: scale 0. Exact: codes and scales are kept as they are (bf16 and fp16 scales
// widened to fp32).
#pragma once

#include "formats/format.h"

namespace kt {

constexpr Format kFormatFp8 = {"FP8", CodeType::kE4m3,    nullptr,        Order::kRowMajor, 1, 128,
                               128,   ScaleType::kScalar, ScaleType::kF32};

constexpr Format kFormatFp8PerChannel = {"FP8_PERCHANNEL", CodeType::kE4m3, nullptr,         Order::kRowMajor, 1, 1,
                                         kWholeRow,        ScaleType::kF32, ScaleType::kNone};

constexpr Format kFormatMxfp8 = {"MXFP8", CodeType::kE4m3,  nullptr,         Order::kRowMajor, 1, 1,
                                 32,      ScaleType::kE8m0, ScaleType::kNone};

}  // namespace kt
