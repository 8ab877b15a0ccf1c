// Every kernel there is: code type x activations x instruction set, each defined in a file compiled with its own -m
// flags.
#pragma once

#include "kernels/kernel_set.h"

namespace kt {

// Element-wise work: kernels/<folder>/rows*.cc.
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;      // fp32 activations
extern const RowKernels kRowsAvx512Bf16;  // bf16 activations

// fp32 codes with activations that are not rounded: kernels/<folder>/f32.cc, rows_exact.cc.
extern const RowKernels kExactRowsAvx2;
extern const RowKernels kExactRowsAvx512;
extern const KernelSet kF32Avx2;
extern const KernelSet kF32Avx512;

// bf16 codes: kernels/<folder>/bf16*.cc.
extern const KernelSet kBf16Avx2;
extern const KernelSet kBf16Avx512;
extern const KernelSet kBf16Avx512Bf16;
extern const KernelSet kBf16Amx;

// float8_e4m3fn codes with scales of any type: kernels/<folder>/e4m3*.cc.
extern const KernelSet kE4m3Avx2;
extern const KernelSet kE4m3Avx512;
extern const KernelSet kE4m3Avx512Bf16;
extern const KernelSet kE4m3Avx512Bf16Fma;  // many tokens by FMA, with the same bits
extern const KernelSet kE4m3Amx;

// 4-bit codes, a table of 16 values, with scales of any type: kernels/<folder>/code4*.cc.
extern const KernelSet kCode4Avx2;
extern const KernelSet kCode4Avx512;
extern const KernelSet kCode4Avx512Bf16;
extern const KernelSet kCode4Avx512Bf16Fma;
extern const KernelSet kCode4Amx;

// Signed bytes with fp32 scales: kernels/<folder>/int8*.cc.
extern const KernelSet kInt8Avx2;
extern const KernelSet kInt8Avx512;
extern const KernelSet kInt8Avx512Bf16;
extern const KernelSet kInt8Amx;

// Blocks of GGUF files, of every type: kernels/<folder>/blocks.cc.
extern const KernelSet kBlocksAvx2;
extern const KernelSet kBlocksAvx512;

// Int8 activations: kernels/<folder>/<codes>_int8*.cc. All of them give the same bits.
extern const KernelSet kCode4Int8Avx2;
extern const KernelSet kCode4Int8AvxVnni;
extern const KernelSet kCode4Int8Avx512;
extern const KernelSet kCode4Int8Avx512Vnni;
extern const KernelSet kCode4Int8Amx;
extern const KernelSet kCode2Int8Avx2;
extern const KernelSet kCode2Int8AvxVnni;
extern const KernelSet kCode2Int8Avx512;
extern const KernelSet kCode2Int8Avx512Vnni;
extern const KernelSet kCode2Int8Amx;
extern const KernelSet kCode3Int8Avx2;
extern const KernelSet kCode3Int8AvxVnni;
extern const KernelSet kCode3Int8Avx512;
extern const KernelSet kCode3Int8Avx512Vnni;
extern const KernelSet kCode3Int8Amx;
extern const KernelSet kCode4WideInt8Avx2;
extern const KernelSet kCode4WideInt8AvxVnni;
extern const KernelSet kCode4WideInt8Avx512;
extern const KernelSet kCode4WideInt8Avx512Vnni;
extern const KernelSet kCode4WideInt8Amx;
extern const KernelSet kCode5Int8Avx2;
extern const KernelSet kCode5Int8AvxVnni;
extern const KernelSet kCode5Int8Avx512;
extern const KernelSet kCode5Int8Avx512Vnni;
extern const KernelSet kCode5Int8Amx;
extern const KernelSet kCode6Int8Avx2;
extern const KernelSet kCode6Int8AvxVnni;
extern const KernelSet kCode6Int8Avx512;
extern const KernelSet kCode6Int8Avx512Vnni;
extern const KernelSet kCode6Int8Amx;
extern const KernelSet kInt8Int8Avx2;
extern const KernelSet kInt8Int8AvxVnni;
extern const KernelSet kInt8Int8Avx512;
extern const KernelSet kInt8Int8Avx512Vnni;
extern const KernelSet kInt8Int8Amx;

// KernelSet::prepare_row of all of those (kernels/avx2/integer_rows.cc): columns ascending, or as the nibbles of 4-bit
// codes stand, 0 4 1 5 2 6 3 7.
void prepare_column_order(const PrepareArgs&);
void prepare_nibble_order(const PrepareArgs&);

}  // namespace kt
