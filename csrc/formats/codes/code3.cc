#include "formats/codes/code3.h"

#include "formats/codes/dot_words.h"

namespace kt {
namespace {

struct Code3 {
  using Order = Ascending;
  static constexpr int kWords = 3;
  static constexpr uint32_t kLow = 0x03030303;
  static constexpr uint32_t kThird = 0x04040404;

  static void join(const Dots& dots, uint32_t (&words)[kWords]) {
    uint32_t third = 0;
    for (int half = 0; half < 2; ++half) {
      const uint32_t* d = dots + 4 * half;
      words[half] = (d[0] & kLow) | (d[1] & kLow) << 2 | (d[2] & kLow) << 4 | (d[3] & kLow) << 6;
    }
    for (int i = 0; i < 8; ++i) third |= i < 2 ? (dots[i] & kThird) >> (2 - i) : (dots[i] & kThird) << (i - 2);
    words[2] = third;
  }
  static void split(const uint32_t (&words)[kWords], Dots& dots) {
    for (int i = 0; i < 8; ++i) {
      const uint32_t third = i < 2 ? words[2] << (2 - i) : words[2] >> (i - 2);
      dots[i] = (words[i / 4] >> 2 * (i % 4) & kLow) | (third & kThird);
    }
  }
};

}  // namespace

const CodeKind kCode3Codes = {"code3", 3, nullptr, nullptr, value_in_dots<Code3>, put_dots<Code3>, take_dots<Code3>};

}  // namespace kt
