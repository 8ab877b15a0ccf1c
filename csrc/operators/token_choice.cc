#include "operators/token_choice.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace kt {
namespace {

// Sums that do not wait for each other; a fixed order, whatever the compiler makes of it.
double sum_of(const float* weights, int64_t count) {
  constexpr int kLanes = 16;
  std::array<double, kLanes> lanes{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += weights[i + l];
  }
  for (; i < count; ++i) lanes[i % kLanes] += weights[i];
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// How many weigh at least so much.
int64_t heavier(const float* weights, int64_t count, float least) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += weights[i] >= least;
  return found;
}

int64_t first_of_largest(const float* weights, int64_t count) {
  constexpr int64_t kBlock = 64;
  int64_t first = 0;
  while (first + kBlock < count && heavier(weights + first, kBlock, 1.0f) == 0) first += kBlock;
  return std::find_if(weights + first, weights + count, [](float w) { return w >= 1; }) - weights;
}

// Where no filter takes anything away: whole blocks are passed by their sums.
int64_t draw_from_all(const float* weights, int64_t count, double uniform) {
  constexpr int64_t kBlock = 1024;
  std::vector<double> blocks((count + kBlock - 1) / kBlock);
  double total = 0;
  for (size_t b = 0; b < blocks.size(); ++b) {
    const int64_t first = static_cast<int64_t>(b) * kBlock;
    total += blocks[b] = sum_of(weights + first, std::min(kBlock, count - first));
  }
  double left = uniform * total;
  int64_t last = 0;
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (blocks[b] == 0) continue;
    const bool is_last = left < blocks[b] || b + 1 == blocks.size();
    if (!is_last) {
      left -= blocks[b];
      last = static_cast<int64_t>(b);
      continue;
    }
    const int64_t first = static_cast<int64_t>(b) * kBlock, end = std::min(first + kBlock, count);
    int64_t found = -1;
    for (int64_t i = first; i < end; ++i) {
      if (weights[i] <= 0) continue;
      found = i;
      left -= weights[i];
      if (left < 0) break;
    }
    return found;
  }
  // Rounding of the sums led past the last block with a weight.
  const int64_t first = last * kBlock;
  int64_t i = std::min(first + kBlock, count) - 1;
  while (weights[i] <= 0) --i;
  return i;
}

struct Candidate {
  float weight;
  int32_t index;
  bool before(const Candidate& other) const {
    return weight != other.weight ? weight > other.weight : index < other.index;
  }
};

// Weights by their size, 16 buckets for each power of two, in descending order: sums and counts fit into 32 KB.
constexpr int kShift = 19;
constexpr uint32_t kBitsOfOne = 0x3f800000;
constexpr int kBuckets = (kBitsOfOne >> kShift) + 1;

int bucket_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof(bits));
  return static_cast<int>((kBitsOfOne - bits) >> kShift);
}

struct Candidates {
  const Candidate* first = nullptr;
  const Candidate* last = nullptr;
  const Candidate* begin() const { return first; }
  const Candidate* end() const { return last; }
  int64_t size() const { return last - first; }
};

// Memory that a thread uses again: for a row of 150,000 fresh pages cost more than the work.
struct Scratch {
  std::vector<Candidate> space, equals;
  std::vector<double> masses;
  std::vector<int32_t> counts;
};

// Tokens that may be drawn, found without sorting more than those that weigh about as much as the last one.
class Kept {
 public:
  Kept(const float* weights, int64_t count, const TokenFilter& filter, Scratch& scratch)
      : filter_(filter), scratch_(scratch) {
    limit_ = filter.top_p * sum_of(weights, count);
    gather(weights, count);
    find_last();
  }

  int64_t draw(double uniform) const {
    double total = 0;
    for (const Candidate& one : candidates_) total += stays(one) ? one.weight : 0;
    double left = uniform * total;
    int64_t drawn = -1;
    for (const Candidate& one : candidates_) {
      if (!stays(one)) continue;
      drawn = one.index;
      left -= one.weight;
      if (left < 0) break;
    }
    return drawn;
  }

 private:
  bool stays(const Candidate& one) const { return one.weight >= filter_.min_p && !last_.before(one); }

  // The heaviest, as many as it takes to have the last one that stays among them. Most rows have a few hundred tokens
  // of a thousandth of the largest.
  void gather(const float* weights, int64_t count) {
    for (const float least : {0x1p-10f, 0x1p-20f, 0x1p-149f}) {
      gather_from(weights, count, least);
      double mass = 0;
      for (const Candidate& one : candidates_) mass += one.weight;
      const bool enough = candidates_.size() >= filter_.top_k || mass > limit_;
      if (enough || filter_.min_p >= least) return;
    }
  }

  // Without a branch for each: among weights about as large as `least` nothing foretells it.
  void gather_from(const float* weights, int64_t count, float least) {
    constexpr int64_t kBlock = 32;
    if (static_cast<int64_t>(scratch_.space.size()) < count) scratch_.space.resize(count);
    Candidate* out = scratch_.space.data();
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t end = std::min(first + kBlock, count);
      if (heavier(weights + first, end - first, least) == 0) continue;
      for (int64_t i = first; i < end; ++i) {
        *out = {weights[i], static_cast<int32_t>(i)};
        out += weights[i] >= least;
      }
    }
    candidates_ = {scratch_.space.data(), out};
  }

  // The last one in order of weight that top_k and top_p leave.
  void find_last() {
    std::vector<double>& masses = scratch_.masses;
    std::vector<int32_t>& counts = scratch_.counts;
    masses.assign(kBuckets, 0);
    counts.assign(kBuckets, 0);
    for (const Candidate& one : candidates_) {
      const int bucket = bucket_of(one.weight);
      masses[bucket] += one.weight;
      ++counts[bucket];
    }
    double mass = 0;
    int64_t before = 0;
    for (int b = 0; b < kBuckets; ++b) {
      if (before + counts[b] >= filter_.top_k || mass + masses[b] > limit_) return find_last_of(b, before, mass);
      mass += masses[b];
      before += counts[b];
    }
    last_ = {0, 0};  // all stay
  }

  void find_last_of(int bucket, int64_t before, double mass) {
    std::vector<Candidate>& equals = scratch_.equals;
    equals.clear();
    for (const Candidate& one : candidates_) {
      if (bucket_of(one.weight) == bucket) equals.push_back(one);
    }
    std::sort(equals.begin(), equals.end(), [](const Candidate& a, const Candidate& b) { return a.before(b); });
    for (const Candidate& one : equals) {
      if (before >= filter_.top_k || mass > limit_) break;
      last_ = one;
      mass += one.weight;
      ++before;
    }
  }

  TokenFilter filter_;
  double limit_;  // of the weights before a token that stays
  Scratch& scratch_;
  Candidates candidates_;  // in ascending order of index
  Candidate last_{1, 0};
};

}  // namespace

int64_t draw_token(const float* weights, int64_t count, const TokenFilter& filter, double uniform) {
  if (heavier(weights, count, 0.0f) < count) {
    throw std::invalid_argument("a row of logits has NaN or infinity, or only minus infinity; expected numbers");
  }
  if (filter.top_k <= 1) return first_of_largest(weights, count);
  if (filter.keeps_all(count)) return draw_from_all(weights, count, uniform);
  thread_local Scratch scratch;
  return Kept(weights, count, filter, scratch).draw(uniform);
}

}  // namespace kt
