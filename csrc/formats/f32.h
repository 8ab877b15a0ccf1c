// FP32 weights: the codes themselves (formats/codes/f32.h), without scales. Of linear layers only: no method reads
// experts in it, so it is not among all_formats().
#pragma once

#include "formats/format.h"

namespace kt {

constexpr Format kFormatF32 = {"F32", CodeType::kF32, nullptr,          Order::kRowMajor, 1,
                               0,     kWholeRow,      ScaleType::kNone, ScaleType::kNone};

}  // namespace kt
