#include "formats/codes/blocks.h"

namespace kt {

const CodeKind kBlockCodes = {"blocks", 16, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace kt
