// What training computes beside the large products, on AVX2 + FMA, 8 fp32 numbers at a time: training-inl.h.
#include <immintrin.h>

#include "kernels/kernel_set.h"
#include "kernels/training.h"

namespace {
// In this order: each builds on the ones before.
#include "kernels/avx2/ops-inl.h"

struct Ops : Avx2 {
  static inline Vec keep_equal(Vec x, Vec y, Vec value) {
    return _mm256_and_ps(_mm256_cmp_ps(x, y, _CMP_EQ_OQ), value);
  }
};

#include "kernels/rows-inl.h"

#include "kernels/training-inl.h"
}  // namespace

constexpr kt::TrainingKernels kt::kTrainingAvx2 = make_training_kernels<Ops>();
