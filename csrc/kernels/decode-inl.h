// Panels of codes and scales as bf16 (training.h), compiled once per instruction set. Included after panel-inl.h and
// the codes, with `Ops` defined, whose pack_pairs(even, odd, to) rounds and stores kLanes rows of two columns.

template <class Ops, class Codes>
struct DecodePanel {
  using P = Panel<Ops, Codes>;
  using Vec = typename Ops::Vec;
  static constexpr int kVecs = P::kVecs;

  template <class Scales>
  static void decode(const kt::DecodeArgs& d) {
    const typename Codes::Tables tables(*d.layout);
    const typename Scales::Constants constants(*d.layout, P::header_of(*d.layout, d.panel));
    const typename Scales::Records records(*d.layout);
    typename Codes::Cursor chunk = Codes::at(*d.layout, d.panel, d.first);
    uint8_t* out = d.out;
    for (int k = d.first; k < d.first + d.columns;) {
      const int group = k / d.layout->group_k;
      const int group_end = (group + 1) * d.layout->group_k;
      const int end = group_end < d.first + d.columns ? group_end : d.first + d.columns;
      const auto place = records.at(d.panel, group);
      Vec scales[kVecs];
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = Scales::load(place, v * Ops::kLanes, constants).scale;
        scales[v] = Codes::kSumFactor == 1 ? scale : Ops::mul(scale, Ops::set(Codes::kSumFactor));
      }
      for (; k < end; k += Codes::kChunkK, chunk = Codes::next(chunk), out += Codes::kChunkK * 2 * kt::kPanelRows) {
        decode_chunk(tables, chunk, scales, out);
      }
    }
  }

  static inline __attribute__((always_inline)) void decode_chunk(const typename Codes::Tables& tables,
                                                                 typename Codes::Cursor chunk,
                                                                 const Vec (&scales)[kVecs], uint8_t* out) {
    for (int s = 0; s < Codes::kSlices; ++s) {
      typename Codes::Decoded decoded[Codes::kDots][Codes::kOutputs];
      Codes::decode(tables, chunk, s, decoded);
      for (int q = 0; q < Codes::kDots; ++q) {
        for (int j = 0; j < Codes::kOutputs; ++j) {
          const int v = s * Codes::kOutputs + j;
          const typename Ops::Weights w = P::own(Codes::weights(decoded[q][j]));
          Ops::pack_pairs(Ops::mul(w.even, scales[v]), Ops::mul(w.odd, scales[v]),
                          out + (q * kVecs + v) * 4 * Ops::kLanes);
        }
      }
    }
  }

  static void run(const kt::DecodeArgs& d) {
    Codes::ScaleTypes::template call<Ops>(d.layout->scale_type, [&](auto scales) { decode<decltype(scales)>(d); });
  }
};
