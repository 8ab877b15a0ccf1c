#include "formats/codes/code_kind.h"

#include "formats/codes/bf16.h"
#include "formats/codes/blocks.h"
#include "formats/codes/code2.h"
#include "formats/codes/code3.h"
#include "formats/codes/code4.h"
#include "formats/codes/code5.h"
#include "formats/codes/code6.h"
#include "formats/codes/e4m3.h"
#include "formats/codes/f32.h"
#include "formats/codes/int8.h"

namespace kt {

const CodeKind& code_kind(CodeType type) {
  static const CodeKind* const kinds[] = {&kBf16Codes,  &kE4m3Codes,  &kCode4Codes, &kInt8Codes,
                                          &kCode5Codes, &kCode6Codes, &kCode3Codes, &kCode2Codes,
                                          &kCode4Codes, &kBlockCodes, &kF32Codes};  // by CodeType
  static_assert(sizeof(kinds) / sizeof(kinds[0]) == kCodeTypes);
  return *kinds[static_cast<int>(type)];
}

size_t row_bytes(const Format& format, int columns) {
  const size_t words = (columns + format.columns_per_word - 1) / format.columns_per_word;
  return words * format.columns_per_word * code_kind(format.codes).bits / 8;
}

}  // namespace kt
