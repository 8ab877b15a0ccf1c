#include "formats/codes/code5.h"

#include "formats/codes/dot_words.h"

namespace kt {
namespace {

struct Code5 {
  using Order = ByNibbles;
  static constexpr int kWords = 5;
  static constexpr uint32_t kLow = 0x0F0F0F0F;
  static constexpr uint32_t kFifth = 0x10101010;

  static void join(const Dots& dots, uint32_t (&words)[kWords]) {
    uint32_t fifth = 0;
    for (int i = 0; i < 4; ++i) words[i] = (dots[2 * i] & kLow) | (dots[2 * i + 1] & kLow) << 4;
    for (int i = 0; i < 4; ++i) fifth |= (dots[i] & kFifth) >> (4 - i) | (dots[4 + i] & kFifth) << i;
    words[4] = fifth;
  }
  static void split(const uint32_t (&words)[kWords], Dots& dots) {
    for (int i = 0; i < 4; ++i) {
      dots[2 * i] = words[i] & kLow;
      dots[2 * i + 1] = words[i] >> 4 & kLow;
    }
    for (int i = 0; i < 4; ++i) {
      dots[i] |= words[4] << (4 - i) & kFifth;
      dots[4 + i] |= words[4] >> i & kFifth;
    }
  }
};

}  // namespace

const CodeKind kCode5Codes = {"code5", 5, nullptr, nullptr, value_in_dots<Code5>, put_dots<Code5>, take_dots<Code5>};

}  // namespace kt
