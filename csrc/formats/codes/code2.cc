#include "formats/codes/code2.h"

#include "formats/codes/dot_words.h"

namespace kt {
namespace {

struct Code2 {
  using Order = Ascending;
  static constexpr int kWords = 2;  // two chunks
  static constexpr uint32_t kTwoBits = 0x03030303;

  static void join(const Dots& dots, uint32_t (&words)[kWords]) {
    for (int i = 0; i < kWords; ++i) {
      const uint32_t* d = dots + 4 * i;
      words[i] = (d[0] & kTwoBits) | (d[1] & kTwoBits) << 2 | (d[2] & kTwoBits) << 4 | (d[3] & kTwoBits) << 6;
    }
  }
  static void split(const uint32_t (&words)[kWords], Dots& dots) {
    for (int i = 0; i < 8; ++i) dots[i] = words[i / 4] >> 2 * (i % 4) & kTwoBits;
  }
};

}  // namespace

const CodeKind kCode2Codes = {"code2", 2, nullptr, nullptr, value_in_dots<Code2>, put_dots<Code2>, take_dots<Code2>};

}  // namespace kt
