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
