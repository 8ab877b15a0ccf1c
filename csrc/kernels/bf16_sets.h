// The kernel sets of format BF16, one per instruction set; each is defined in a file compiled with its own -m flags.
#pragma once

#include "kernels/kernel_set.h"

namespace kt {

extern const KernelSet kBf16Avx2;        // kernels/avx2/bf16.cc
extern const KernelSet kBf16Avx512;      // kernels/avx512/bf16.cc
extern const KernelSet kBf16Avx512Bf16;  // kernels/avx512/bf16_dot.cc
extern const KernelSet kBf16Amx;         // kernels/amx/bf16.cc

}  // namespace kt
