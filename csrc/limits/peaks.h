// Loops that do nothing but one kind of arithmetic from registers: the most an instruction set can give on this CPU.
// Each runs `rounds` rounds of a known number of operations (a multiply-add counts as two) and returns a value that
// depends on all of them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt {

struct Peak {
  const char* name;
  double operations_per_round;
  float (*run)(uint64_t rounds);
};

extern const Peak kPeakF32Avx2;
extern const Peak kPeakInt8Avx2;
extern const Peak kPeakInt4Avx2;
extern const Peak kPeakInt8AvxVnni;
extern const Peak kPeakF32Avx512;
extern const Peak kPeakInt8Avx512;
extern const Peak kPeakInt4Avx512;
extern const Peak kPeakInt8Avx512Vnni;
extern const Peak kPeakBf16Avx512;
extern const Peak kPeakBf16Amx;
extern const Peak kPeakInt8Amx;

// Sum over all 8-byte words of [data, data + bytes), AVX2 loads; bytes is a multiple of 256.
extern uint64_t (*const kReadAvx2)(const uint8_t* data, size_t bytes);

}  // namespace kt
