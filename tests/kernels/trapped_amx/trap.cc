// AMX for a process on a CPU without it: preloaded (LD_PRELOAD), this library runs the instructions that raise SIGILL.
//
//   AMX instruction       runs on tiles of the thread (tiles.h), then the program goes on behind it
//   27 A2, 27 01 D0       CPUID and XGETBV in a copy of the extension made by trapped_amx.py; answered as on Sapphire
//                         Rapids, with what this CPU itself has of AVX512. 27 is no instruction in 64-bit mode.
//   arch_prctl            Linux grants the tiles (KT_TEST_TILES=refused: it does not)
//
// Everything else of the program runs natively and unchanged. Handlers for SIGILL that the program installs
// (faulthandler does) are remembered, and called for what is not ours. Memory that an instruction may not touch ends
// the process by SIGSEGV, as on the CPU.
#include <cpuid.h>
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "instruction.h"
#include "tiles.h"

namespace trapped_amx {
namespace {

constexpr long kArchReqXcompPerm = 0x1023;
constexpr int kOfEncoding[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

using SigactionFn = int (*)(int, const struct sigaction*, struct sigaction*);
using SyscallFn = long (*)(long, ...);

thread_local TileFile tiles;      // zero: nothing configured
struct sigaction program_action;  // what the program thinks is installed for SIGILL

SigactionFn real_sigaction() {
  static const auto function = reinterpret_cast<SigactionFn>(dlsym(RTLD_NEXT, "sigaction"));
  return function;
}

bool tiles_refused() {
  const char* wish = getenv("KT_TEST_TILES");
  return wish != nullptr && strcmp(wish, "refused") == 0;
}

// Says what a real CPU would have raised; the process then ends by SIGILL.
[[noreturn]] void die(const char* why, const uint8_t* code) {
  char text[256];
  const int length = snprintf(text, sizeof(text), "trapped AMX: %02x %02x %02x %02x %02x is invalid here: %s\n",
                              code[0], code[1], code[2], code[3], code[4], why);
  if (write(STDERR_FILENO, text, length) < 0) {
    // Nobody to tell.
  }
  struct sigaction plain = {};
  plain.sa_handler = SIG_DFL;
  real_sigaction()(SIGILL, &plain, nullptr);
  sigset_t ill;
  sigemptyset(&ill);
  sigaddset(&ill, SIGILL);
  pthread_sigmask(SIG_UNBLOCK, &ill, nullptr);
  raise(SIGILL);
  _exit(1);
}

const char* execute(const Instruction& i) {
  switch (i.operation) {
    case Operation::kLoadConfig:
      return tiles.load_config(*reinterpret_cast<const TileConfig*>(i.memory.base + i.memory.stride));
    case Operation::kStoreConfig:
      tiles.store_config(reinterpret_cast<TileConfig*>(i.memory.base + i.memory.stride));
      return nullptr;
    case Operation::kRelease:
      tiles.release();
      return nullptr;
    case Operation::kZero:
      return tiles.zero(i.tile);
    case Operation::kLoad:
      return tiles.load(i.tile, i.memory);
    case Operation::kStore:
      return tiles.store(i.tile, i.memory);
    case Operation::kMultiply:
      return tiles.multiply(i.product, i.tile, i.first, i.second);
    case Operation::kNone:
      break;
  }
  return "unknown";
}

// Intel's name, AMX-TILE, AMX-BF16 and AMX-INT8; the rest is this CPU's.
void answer_cpuid(greg_t* registers) {
  const auto leaf = static_cast<uint32_t>(registers[REG_RAX]), subleaf = static_cast<uint32_t>(registers[REG_RCX]);
  uint32_t eax, ebx, ecx, edx;
  __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
  if (leaf == 0) {
    memcpy(&ebx, "Genu", 4);
    memcpy(&edx, "ineI", 4);
    memcpy(&ecx, "ntel", 4);
  } else if (leaf == 7 && subleaf == 0) {
    edx |= 1u << 22 | 1u << 24 | 1u << 25;
  }
  registers[REG_RAX] = eax;
  registers[REG_RBX] = ebx;
  registers[REG_RCX] = ecx;
  registers[REG_RDX] = edx;
}

// The system saves the registers of tiles as well (bits 17 and 18).
void answer_xgetbv(greg_t* registers) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(registers[REG_RCX]));
  registers[REG_RAX] = low | 0x60000u;
  registers[REG_RDX] = high;
}

// Bytes of the instruction that was answered, 0 when it asks nothing.
int answer_question(const uint8_t* code, greg_t* registers) {
  if (code[0] == 0x27 && code[1] == 0xA2) {
    answer_cpuid(registers);
    return 2;
  }
  if (code[0] == 0x27 && code[1] == 0x01 && code[2] == 0xD0) {
    answer_xgetbv(registers);
    return 3;
  }
  return 0;
}

// The program's own handler, or the end that the signal has without one.
void pass_on(int number, siginfo_t* info, void* context) {
  if (program_action.sa_flags & SA_SIGINFO) {
    program_action.sa_sigaction(number, info, context);
  } else if (program_action.sa_handler != SIG_DFL && program_action.sa_handler != SIG_IGN) {
    program_action.sa_handler(number);
  } else {
    real_sigaction()(SIGILL, &program_action, nullptr);  // and the instruction is met again
  }
}

void on_illegal_instruction(int number, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (const int length = answer_question(code, registers)) {
    registers[REG_RIP] += length;
    return;
  }
  Registers values;
  for (int r = 0; r < 16; ++r) values.general[r] = static_cast<uint64_t>(registers[kOfEncoding[r]]);
  values.rip = static_cast<uint64_t>(registers[REG_RIP]);
  Instruction instruction = decode(code, values);
  if (instruction.operation == Operation::kNone) {
    pass_on(number, info, context);
    return;
  }
  // And those that follow at once: a trap costs more than most of them. They change no general register.
  for (; instruction.operation != Operation::kNone; instruction = decode(code, values)) {
    if (const char* why = execute(instruction)) die(why, code);
    values.rip += instruction.length;
    code += instruction.length;
  }
  registers[REG_RIP] = static_cast<greg_t>(values.rip);
  errno = saved_errno;
}

__attribute__((constructor)) void install() {
  struct sigaction ours = {};
  ours.sa_sigaction = on_illegal_instruction;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
  real_sigaction()(SIGILL, &ours, &program_action);
}

}  // namespace
}  // namespace trapped_amx

// In front of the C library's own, for the whole process.
extern "C" int sigaction(int number, const struct sigaction* action, struct sigaction* previous) {
  using namespace trapped_amx;
  if (number != SIGILL) return real_sigaction()(number, action, previous);
  const struct sigaction before = program_action;
  if (action != nullptr) program_action = *action;
  if (previous != nullptr) *previous = before;
  return 0;
}

extern "C" long syscall(long number, ...) {
  using namespace trapped_amx;
  static const auto real = reinterpret_cast<SyscallFn>(dlsym(RTLD_NEXT, "syscall"));
  va_list list;
  va_start(list, number);
  long argument[6];
  for (long& value : argument) value = va_arg(list, long);  // registers or stack: reading more than given is harmless
  va_end(list);
  if (number == SYS_arch_prctl && argument[0] == kArchReqXcompPerm) {
    if (!tiles_refused()) return 0;
    errno = EPERM;
    return -1;
  }
  return real(number, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
}
