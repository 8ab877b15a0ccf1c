// BF16 weights: the codes themselves (formats/codes/bf16.h), without scales.
#pragma once

#include "formats/format.h"

namespace kt {

constexpr Format kFormatBf16 = {"BF16", CodeType::kBf16, nullptr,          Order::kRowMajor, 1,
                                0,      kWholeRow,       ScaleType::kNone, ScaleType::kNone};

}  // namespace kt
