// One peak loop, compiled once per instruction set: kChains independent accumulators hide the latency of `Op::step`.

template <class Op, int kChains>
float run_peak(uint64_t rounds) {
  typename Op::Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Op::start(i);
  const typename Op::Operand a = Op::left(), b = Op::right();
  for (uint64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) acc[i] = Op::step(acc[i], a, b);
  }
  typename Op::Vec sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = Op::combine(sum, acc[i]);
  return Op::first(sum);
}

// Dot products of int8 without VNNI, for codes small enough (4 bits) that kProducts pairs of products fit in 16 bits:
// so many VPMADDUBSW, their sum in 16 bits, then one VPMADDWD with ones and one addition in 32 bits. `Op` names these
// instructions. The right operands come from memory, as a kernel's activations do, and every product depends on the
// chain's own sum, so that none can be left out. The empty asm statements keep GCC from adding the products of all
// chains as trees, for which the registers do not suffice.
template <class Op, int kChains, int kProducts>
float run_sums_in_16_bits(uint64_t rounds) {
  using Vec = typename Op::Vec;
  alignas(sizeof(Vec)) int8_t activations[kProducts][sizeof(Vec)];
  for (int p = 0; p < kProducts; ++p) {
    for (int8_t& a : activations[p]) a = static_cast<int8_t>(p - 3);
  }
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Op::bytes(i + 1);
  for (uint64_t r = 0; r < rounds; ++r) {
    const int8_t (*a)[sizeof(Vec)] = activations;
    asm("" : "+r"(a));
    Vec sum[kChains];
    for (int i = 0; i < kChains; ++i) sum[i] = Op::products(acc[i], a[0]);
#pragma GCC unroll 16
    for (int p = 1; p < kProducts; ++p) {
      for (int i = 0; i < kChains; ++i) {
        sum[i] = Op::add16(sum[i], Op::products(acc[i], a[p]));
        asm("" : "+v"(sum[i]));
      }
    }
    for (int i = 0; i < kChains; ++i) acc[i] = Op::add32(acc[i], Op::widened(sum[i]));
  }
  Vec sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = Op::add32(sum, acc[i]);
  return Op::first(sum);
}
