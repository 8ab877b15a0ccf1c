// What training computes beside the large products, on AVX512 (F, BW, VL, DQ), 16 fp32 numbers at a time:
// training-inl.h.
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/training.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx512/ops-inl.h"

struct Ops : Avx512 {
  static inline Vec keep_equal(Vec x, Vec y, Vec value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ), value);
  }
};

#include "kernels/rows-inl.h"

#include "kernels/training-inl.h"
}  // namespace

constexpr kt::TrainingKernels kt::kTrainingAvx512 = make_training_kernels<Ops>();
