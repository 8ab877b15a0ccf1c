// Formats of 4-bit codes: they differ in the table of 16 values, the scales and the order of the checkpoint's bytes.
//
//   method     code        weight of (n, k)                            checkpoint scales
//   RAWINT4    offset int  (q[n, k] - 8) * s[n, k / g]                  bf16, fp16 or fp32 [N, K/g]
//   GPTQ_INT4  offset int  (q[k, n] - 8) * s[k / g, n]                  fp16, bf16 or fp32 [K/g, N]
//   MXFP4      E2M1        e2m1(q[n, k]) * 2^(b[n, k / 32] - 127)       bytes [N, K/32]  (OCP Microscaling 1.0, 2023)
//   NVFP4      E2M1        e2m1(q[n, k]) * e4m3(b[n, k / 16]) * factor  bytes [N, K/16], one fp32 factor
//
// Checkpoint codes: RAWINT4 int32 [N, K/8] (compressed-tensors "pack-quantized"), MXFP4 and NVFP4 bytes [N, K/2]: in
// both, byte b of a row has column 2b in its low nibble and 2b+1 in its high nibble. GPTQ_INT4 int32 [K/8, N], column
// 8j + i of row n in bits 4i..4i+3 of word [j, n].
//
// Packed: panels of 32 rows; a chunk of 128 bytes holds 8 columns of them, a 32-bit word for each row:
//
//   word r:  bits  0..15 = columns 0 2 4 6      one nibble each, ascending
//            bits 16..31 = columns 1 3 5 7
//
//   panel:  | chunk k=0..7 | chunk k=8..15 | ... | header | scales: per group of columns one record of 32 |
//
// Shifted right by 4*i, the low nibbles of the two halves of each word are the pair of columns 2i, 2i+1: VPERMW, which
// looks up 16-bit values by the low bits of each half, makes pairs of bf16 of them (AVX512).
//
// Padding: the code of zero, scale 0. Exact: codes and scales are kept as they are.
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
