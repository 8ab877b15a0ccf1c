// Every AMX instruction and every form of address, one function each, for test_amx_instructions.py.
// Compiled with -mamx-tile -mamx-bf16 -mamx-int8; which registers hold an address decides how it is encoded.
#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr int kRowBytes = 64;  // of the operands that multiply() reads

alignas(64) uint8_t config_near_the_code[64];

}  // namespace

extern "C" {

void load_config(const void* config) { _tile_loadconfig(config); }
void store_config(void* config) { _tile_storeconfig(config); }
void release() { _tile_release(); }

// Address relative to RIP.
void copy_config_near_the_code(const uint8_t* config, uint8_t* copy) {
  for (int i = 0; i < 64; ++i) config_near_the_code[i] = config[i];
  __asm__ volatile("ldtilecfg %0" : : "m"(config_near_the_code));
  for (uint8_t& byte : config_near_the_code) byte = 0;
  __asm__ volatile("sttilecfg %0" : "=m"(config_near_the_code));
  for (int i = 0; i < 64; ++i) copy[i] = config_near_the_code[i];
}

// A configuration under base + 8 * index + displacement, with registers beyond the first eight.
void copy_config_indexed(const uint8_t* config, uint8_t* copy) {
  register const uint8_t* from __asm__("r13") = config - 80;
  register uint8_t* to __asm__("r12") = copy + 80;
  register int64_t index __asm__("r9") = 10;
  __asm__ volatile(
      "ldtilecfg (%0,%2,8)\n"
      "neg %2\n"
      "sttilecfg (%1,%2,8)"
      : "+r"(from), "+r"(to), "+r"(index)
      :
      : "memory");
}

// C += A * B on tiles 0, 1 and 2, or on 5, 7 and 3, of a configuration that is loaded.
void multiply(int product, const void* a, const void* b, void* c) {
  _tile_loadd(0, c, kRowBytes);
  _tile_loadd(1, a, kRowBytes);
  _tile_loadd(2, b, kRowBytes);
  switch (product) {
    case 0:
      _tile_dpbf16ps(0, 1, 2);
      break;
    case 1:
      _tile_dpbssd(0, 1, 2);
      break;
    case 2:
      _tile_dpbsud(0, 1, 2);
      break;
    case 3:
      _tile_dpbusd(0, 1, 2);
      break;
    case 4:
      _tile_dpbuud(0, 1, 2);
      break;
  }
  _tile_stored(0, c, kRowBytes);
}

void multiply_high_tiles(const void* a, const void* b, void* c) {
  _tile_loadd(5, c, kRowBytes);
  _tile_loadd(7, a, kRowBytes);
  _tile_loadd(3, b, kRowBytes);
  _tile_dpbssd(5, 7, 3);
  _tile_stored(5, c, kRowBytes);
}

// TDPBSSD of tiles 0, 1 and 1, which assemblers refuse.
void multiply_with_itself() { __asm__ volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc1"); }

void load_store(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  _tile_loadd(0, from, from_stride);
  _tile_stored(0, to, to_stride);
}

void stream_load_store(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  _tile_stream_loadd(0, from, from_stride);
  _tile_stored(0, to, to_stride);
}

void load_zero_store(const void* from, void* to) {
  _tile_loadd(0, from, kRowBytes);
  _tile_zero(0);
  _tile_stored(0, to, kRowBytes);
}

// Short displacements, a scaled index.
void load_store_scaled(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
  from += 100, to -= 100, from_stride /= 4, to_stride /= 2;
  __asm__ volatile(
      "tileloadd -100(%0,%1,4), %%tmm6\n"
      "tilestored %%tmm6, 100(%2,%3,2)"
      :
      : "r"(from), "r"(from_stride), "r"(to), "r"(to_stride)
      : "memory");
}

// Long displacements; r12, r13 and r15, which need other encodings than rsp, rbp and rdi in the same places.
void load_store_far(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
  register const char* base __asm__("r13") = from - 0x12345;
  register int64_t stride __asm__("r12") = from_stride;
  register char* target __asm__("r12");
  __asm__ volatile("tileloadd 0x12345(%0,%1,1), %%tmm7" : : "r"(base), "r"(stride));
  target = to + 0x12345;
  register int64_t target_stride __asm__("r15") = to_stride;
  __asm__ volatile("tilestored %%tmm7, -0x12345(%0,%1,1)" : : "r"(target), "r"(target_stride) : "memory");
}

// Without displacement r13 needs one of zero; without an index every row is the first.
void load_store_one_row(const char* from, char* to, int64_t to_stride) {
  register const char* base __asm__("r13") = from;
  register char* target __asm__("r13");
  __asm__ volatile("tileloadd (%0), %%tmm4" : : "r"(base));
  target = to;
  __asm__ volatile("tilestored %%tmm4, (%0,%1,1)" : : "r"(target), "r"(to_stride) : "memory");
}
}
