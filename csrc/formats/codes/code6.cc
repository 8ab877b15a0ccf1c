#include "formats/codes/code6.h"

#include "formats/codes/dot_words.h"

namespace kt {
namespace {

struct Code6 {
  using Order = ByNibbles;
  static constexpr int kWords = 6;  // two chunks
  static constexpr uint32_t kLow = 0x0F0F0F0F;
  static constexpr uint32_t kHigh = 0x30303030;

  static void join(const Dots& dots, uint32_t (&words)[kWords]) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t* d = dots + 4 * half;
      uint32_t* chunk = words + 3 * half;
      for (int i = 0; i < 2; ++i) chunk[i] = (d[2 * i] & kLow) | (d[2 * i + 1] & kLow) << 4;
      chunk[2] = (d[0] & kHigh) >> 4 | (d[1] & kHigh) >> 2 | (d[2] & kHigh) | (d[3] & kHigh) << 2;
    }
  }
  static void split(const uint32_t (&words)[kWords], Dots& dots) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t* chunk = words + 3 * half;
      uint32_t* d = dots + 4 * half;
      d[0] = (chunk[0] & kLow) | (chunk[2] << 4 & kHigh);
      d[1] = (chunk[0] >> 4 & kLow) | (chunk[2] << 2 & kHigh);
      d[2] = (chunk[1] & kLow) | (chunk[2] & kHigh);
      d[3] = (chunk[1] >> 4 & kLow) | (chunk[2] >> 2 & kHigh);
    }
  }
};

}  // namespace

const CodeKind kCode6Codes = {"code6", 6, nullptr, nullptr, value_in_dots<Code6>, put_dots<Code6>, take_dots<Code6>};

}  // namespace kt
