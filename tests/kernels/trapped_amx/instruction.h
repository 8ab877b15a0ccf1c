// Reads one AMX instruction: a three-byte VEX prefix, opcode 49, 4B, 5C or 5E, ModRM, and what memory operands add.
#pragma once

#include <stdint.h>

#include "tiles.h"

namespace trapped_amx {

enum class Operation {
  kNone,  // not an AMX instruction that is known here
  kLoadConfig,
  kStoreConfig,
  kRelease,
  kZero,
  kLoad,
  kStore,
  kMultiply,
};

// General registers in the order of their encoding: rax rcx rdx rbx rsp rbp rsi rdi r8 .. r15.
struct Registers {
  uint64_t general[16];
  uint64_t rip;
};

struct Instruction {
  Operation operation = Operation::kNone;
  int length = 0;
  int tile = 0;                      // the one that is written, or stored
  int first = 0, second = 0;         // sources of kMultiply
  Product product = Product::kBf16;  // of kMultiply
  Rows memory = {0, 0};              // of loads and stores; a configuration uses the base alone
};

Instruction decode(const uint8_t* code, const Registers& registers);

}  // namespace trapped_amx
