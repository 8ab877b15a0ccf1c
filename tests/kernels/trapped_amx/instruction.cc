#include "instruction.h"

#include <string.h>

namespace trapped_amx {
namespace {

enum Prefix { kNoPrefix = 0, k66 = 1, kF3 = 2, kF2 = 3 };  // the two lowest bits of the VEX prefix

// The fields of C4 | RXB mmmmm | W vvvv L pp | opcode | ModRM, negated bits put right.
struct Fields {
  const uint8_t* code;
  bool extends_reg, extends_index, extends_base;
  int vvvv;
  Prefix prefix;
  int opcode;
  int mod, reg, rm;

  explicit Fields(const uint8_t* c)
      : code(c),
        extends_reg(!(c[1] & 0x80)),
        extends_index(!(c[1] & 0x40)),
        extends_base(!(c[1] & 0x20)),
        vvvv(~(c[2] >> 3) & 15),
        prefix(static_cast<Prefix>(c[2] & 3)),
        opcode(c[3]),
        mod(c[4] >> 6),
        reg(c[4] >> 3 & 7),
        rm(c[4] & 7) {}
  bool in_memory() const { return mod != 3; }
};
constexpr int kBytesBeforeOperand = 5;

bool is_vex_0f38_w0_128(const uint8_t* c) { return c[0] == 0xC4 && (c[1] & 0x1F) == 2 && (c[2] & 0x84) == 0; }

int32_t displacement(const uint8_t* from, int bytes) {
  if (bytes == 1) return static_cast<int8_t>(*from);
  int32_t value = 0;
  if (bytes == 4) memcpy(&value, from, sizeof(value));
  return value;
}

// Fills length and memory. Without an index register the stride is 0, as in the CPU.
void read_memory_operand(const Fields& f, const Registers& registers, Instruction& i) {
  const uint8_t* next = f.code + kBytesBeforeOperand;
  int displacement_bytes = f.mod == 1 ? 1 : f.mod == 2 ? 4 : 0;
  uint64_t base = 0;
  bool relative = false;
  if (f.rm == 4) {
    const int sib = *next++;
    const int index = (sib >> 3 & 7) + 8 * f.extends_index;
    if (index != 4) i.memory.stride = static_cast<int64_t>(registers.general[index] << (sib >> 6));
    if ((sib & 7) == 5 && f.mod == 0) {
      displacement_bytes = 4;
    } else {
      base = registers.general[(sib & 7) + 8 * f.extends_base];
    }
  } else if (f.rm == 5 && f.mod == 0) {
    displacement_bytes = 4;
    relative = true;
  } else {
    base = registers.general[f.rm + 8 * f.extends_base];
  }
  i.length = static_cast<int>(next - f.code) + displacement_bytes;
  if (relative) base = registers.rip + i.length;
  i.memory.base = base + displacement(next, displacement_bytes);
}

// LDTILECFG, STTILECFG, TILERELEASE, TILEZERO.
Operation configuration_operation(const Fields& f) {
  if (f.in_memory() && f.reg == 0 && f.prefix == kNoPrefix) return Operation::kLoadConfig;
  if (f.in_memory() && f.reg == 0 && f.prefix == k66) return Operation::kStoreConfig;
  if (!f.in_memory() && f.reg == 0 && f.rm == 0 && f.prefix == kNoPrefix) return Operation::kRelease;
  if (!f.in_memory() && f.rm == 0 && f.prefix == kF2) return Operation::kZero;
  return Operation::kNone;
}

// TILELOADD, TILELOADDT1, TILESTORED: only addresses with a SIB byte.
Operation memory_operation(const Fields& f) {
  if (!f.in_memory() || f.rm != 4) return Operation::kNone;
  if (f.prefix == kF2 || f.prefix == k66) return Operation::kLoad;
  return f.prefix == kF3 ? Operation::kStore : Operation::kNone;
}

// TDPBF16PS tmm(reg), tmm(rm), tmm(vvvv) and the four of bytes. TDPFP16PS (5C, F2) is not known.
Operation product_operation(const Fields& f, Product& product) {
  constexpr Product kOfBytes[] = {Product::kU8U8, Product::kU8S8, Product::kS8U8, Product::kS8S8};
  if (f.in_memory() || f.vvvv > 7 || f.extends_base) return Operation::kNone;
  if (f.opcode == 0x5C && f.prefix != kF3) return Operation::kNone;
  product = f.opcode == 0x5C ? Product::kBf16 : kOfBytes[f.prefix];
  return Operation::kMultiply;
}

}  // namespace

Instruction decode(const uint8_t* code, const Registers& registers) {
  Instruction i;
  if (!is_vex_0f38_w0_128(code)) return i;
  const Fields f(code);
  if (f.extends_reg) return i;
  if (f.opcode == 0x5C || f.opcode == 0x5E) {
    i.operation = product_operation(f, i.product);
  } else if (f.vvvv == 0 && f.opcode == 0x49) {
    i.operation = configuration_operation(f);
  } else if (f.vvvv == 0 && f.opcode == 0x4B) {
    i.operation = memory_operation(f);
  }
  i.length = kBytesBeforeOperand;
  i.tile = f.reg;
  i.first = f.rm;
  i.second = f.vvvv;
  if (f.in_memory()) read_memory_operand(f, registers, i);
  return i;
}

}  // namespace trapped_amx
