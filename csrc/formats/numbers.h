// The number formats of codes and scales, decoded one by one from their definitions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace kt {

inline float from_bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// Rounded to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  const uint32_t rounded = word + 0x7FFF + (word >> 16 & 1);
  const uint32_t quiet = word | 0x400000;
  return static_cast<uint16_t>((value == value ? rounded : quiet) >> 16);
}

// IEEE 754 binary16: s eeeee mmmmmmmmmm, bias 15.
inline float from_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = bits >> 15 != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

// float8_e4m3fn: s eeee mmm, bias 7, s1111111 is NaN.
inline double from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15;
  const int mantissa = bits & 7;
  const double sign = bits >> 7 != 0 ? -1.0 : 1.0;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(mantissa, -9);
  return sign * std::ldexp(8 + mantissa, exponent - 10);
}

// ue8m0: a power of two; 255 is NaN.
inline double from_e8m0(uint8_t bits) {
  return bits == 255 ? std::numeric_limits<double>::quiet_NaN() : std::ldexp(1.0, bits - 127);
}

}  // namespace kt
