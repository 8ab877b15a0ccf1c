#include "limits/limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "core/cpu_features.h"
#include "core/memory.h"
#include "limits/peaks.h"

namespace kt {
namespace {

constexpr double kSecondsPerRun = 0.05;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// First row whose features are active; fastest first.
struct Row {
  FeatureSet needs;
  const Peak* peak;
};
const Peak& choose(std::initializer_list<Row> rows) {
  for (const Row& row : rows) {
    if (cpu_features().active.includes(row.needs)) return *row.peak;
  }
  return *(rows.end() - 1)->peak;
}

// Seconds until `work(part)` has been done for as many parts as there are threads, each by one of its sub-pool.
template <class Work>
double timed(ThreadPools& pools, Work work) {
  std::vector<int> first_of_subpool;
  for (int s = 0, first = 0; s < pools.subpools(); first += pools.threads_in(s++)) first_of_subpool.push_back(first);
  const double begin = now();
  pools.for_each_in_subpools(pools.threads_per_subpool(),
                             [&](const Worker&, int subpool, int part) { work(first_of_subpool[subpool] + part); });
  return now() - begin;
}

Limit measure_peak(ThreadPools& pools, const Peak& peak, int repeats) {
  std::atomic<float> sink{0};
  const auto seconds = [&](uint64_t rounds) {
    return timed(pools, [&](int) { sink.store(peak.run(rounds), std::memory_order_relaxed); });
  };
  uint64_t rounds = 1000;
  while (seconds(rounds) < kSecondsPerRun / 4) rounds *= 2;
  rounds *= 4;
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    best = std::max(best, peak.operations_per_round * rounds * pools.threads() / seconds(rounds));
  }
  return {peak.name, best};
}

Limit measure_read(ThreadPools& pools, size_t bytes, int repeats) {
  constexpr size_t kGrain = 4096;
  std::vector<Buffer> parts;
  const size_t share = bytes / pools.threads() / kGrain * kGrain;
  for (int i = 0; i < pools.threads(); ++i) parts.emplace_back(share + kGrain, pools.node_of(pools.subpool_of(i)));
  std::atomic<uint64_t> sink{0};
  timed(pools, [&](int part) {  // the pages are there before they are timed
    for (size_t b = 0; b < parts[part].size(); b += kGrain) parts[part].data()[b] = 1;
  });
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const double seconds =
        timed(pools, [&](int part) { sink.store(kReadAvx2(parts[part].data(), share), std::memory_order_relaxed); });
    best = std::max(best, static_cast<double>(share) * pools.threads() / seconds);
  }
  return {"sequential read", best};
}

}  // namespace

Limits measure_limits(ThreadPools& pools, size_t bytes, int repeats) {
  using F = Feature;
  const Peak& f32 = choose({{{F::kAvx512f}, &kPeakF32Avx512}, {{}, &kPeakF32Avx2}});
  const Peak& bf16 =
      choose({{{F::kAmxTile, F::kAmxBf16}, &kPeakBf16Amx}, {{F::kAvx512bf16}, &kPeakBf16Avx512}, {{}, &f32}});
  const FeatureSet avx512 = {F::kAvx512f, F::kAvx512bw};
  const Peak& int8 = choose({{{F::kAmxTile, F::kAmxInt8}, &kPeakInt8Amx},
                             {{F::kAvx512f, F::kAvx512vnni}, &kPeakInt8Avx512Vnni},
                             {{F::kAvxVnni}, &kPeakInt8AvxVnni},
                             {avx512, &kPeakInt8Avx512},
                             {{}, &kPeakInt8Avx2}});
  const Peak& int4 = &int8 == &kPeakInt8Avx2 ? kPeakInt4Avx2 : &int8 == &kPeakInt8Avx512 ? kPeakInt4Avx512 : int8;
  Limits limits;
  limits.read = measure_read(pools, bytes, repeats);
  limits.bf16_dot = measure_peak(pools, bf16, repeats);
  limits.int8_dot = measure_peak(pools, int4, repeats);
  limits.int8_widened = &int4 == &int8 ? limits.int8_dot : measure_peak(pools, int8, repeats);
  limits.f32_fma = measure_peak(pools, f32, repeats);
  return limits;
}

}  // namespace kt
