// Formats of 4-bit codes: they differ in the table of 16 values, the scales and the order of the checkpoint's bytes.
//
//   method     code        weight of (n, k)                            checkpoint scales
//   RAWINT4    offset int  (q[n, k] - 8) * s[n, k / g]                  bf16, fp16 or fp32 [N, K/g]
//   GPTQ_INT4  offset int  (q[k, n] - 8) * s[k / g, n]                  fp16, bf16 or fp32 [K/g, N]
//   MXFP4      E2M1        e2m1(q[n, k]) * 2^(b[n, k / 32] - 127)       bytes [N, K/32]  (OCP Microscaling 1.0, 2023)
//   NVFP4      E2M1        e2m1(q[n, k]) * e4m3(b[n, k / 16]) * factor  bytes [N, K/16], one fp32 factor
//
// Codes (formats/codes/code4.h): RAWINT4 int32 [N, K/8] (compressed-tensors "pack-quantized"), MXFP4 and NVFP4 bytes
// [N, K/2], GPTQ_INT4 int32 [K/8, N].
//
// Scales in a panel: per group of columns one record of 32. Padding: scale 0. Exact: codes and scales are kept as they
// are.
#pragma once

#include "formats/format.h"

namespace kt {

// -8 .. 7
constexpr CodeTable kOffsetInt4 = {{0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80,
                                    0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0},
                                   8};

// 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
constexpr CodeTable kE2m1 = {{0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80,
                              0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0},
                             0};

constexpr Format kFormatRawInt4 = {"RAWINT4", CodeType::kCode4, &kOffsetInt4,     Order::kRowMajor, 8,
                                   1,         kGroupOption,     ScaleType::kNone, ScaleType::kNone};

constexpr Format kFormatGptqInt4 = {"GPTQ_INT4", CodeType::kCode4, &kOffsetInt4,     Order::kTransposed, 8,
                                    1,           kGroupOption,     ScaleType::kNone, ScaleType::kNone};

// Written back with bf16 scales, which hold every power of two of the bytes: what SGLang's device experts take.
constexpr Format kFormatMxfp4 = {"MXFP4", CodeType::kCode4, &kE2m1,          Order::kRowMajor, 2, 1,
                                 32,      ScaleType::kE8m0, ScaleType::kBf16};

constexpr Format kFormatNvfp4 = {"NVFP4", CodeType::kCode4, &kE2m1,          Order::kRowMajor, 2, 1,
                                 16,      ScaleType::kE4m3, ScaleType::kNone};

}  // namespace kt
