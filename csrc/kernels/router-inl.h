// Choice of experts (router.h), compiled once per instruction set after elements-inl.h and rows-inl.h (exp). Scores are
// fp32 whatever the logits' type.

template <class Ops>
struct Router {
  using All = Elements<Ops>;
  using Vec = typename Ops::Vec;
  using F32 = AsF32<Ops>;
  static constexpr int kLanes = Ops::kLanes;
  static constexpr float kLast = -__builtin_inff();

  static inline float largest_lane(Vec v) {
    float lanes[kLanes];
    Ops::store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] = lanes[l] > lanes[l + half] ? lanes[l] : lanes[l + half];
    }
    return lanes[0];
  }

  // Of numbers that are none (NaN) and none at all: kLast.
  static inline float largest(const float* numbers, int count) {
    Vec best = Ops::set(kLast);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) best = Ops::max(Ops::load(numbers + i), best);
    float result = largest_lane(best);
    for (; i < count; ++i) result = numbers[i] > result ? numbers[i] : result;
    return result;
  }

  struct Softmax {
    static void scores(const float* logits, int experts, float* scores) {
      const Vec top = Ops::set(largest(logits, experts));
      All::for_vectors(experts, [&](int i, auto extent) {
        const Vec below = Ops::sub(load<F32>(logits + i, extent), top);
        store<F32>(Rows<Ops>::exp(Ops::max(Ops::set(-140.0f), below)), scores + i, extent);
      });
      const float sum = All::sum(experts, [&](int i, auto extent) { return load<F32>(scores + i, extent); });
      const Vec total = Ops::set(sum);
      All::for_vectors(experts, [&](int i, auto extent) {
        store<F32>(Ops::div(load<F32>(scores + i, extent), total), scores + i, extent);
      });
    }
  };

  struct Sigmoid {
    static void scores(const float* logits, int experts, float* scores) {
      All::for_vectors(experts, [&](int i, auto extent) {
        Vec t = Ops::sub(Ops::zero(), load<F32>(logits + i, extent));
        t = Ops::max(Ops::set(-140.0f), Ops::min(Ops::set(140.0f), t));
        const Vec score = Ops::div(Ops::set(1.0f), Ops::add(Ops::set(1.0f), Rows<Ops>::exp(t)));
        store<F32>(score, scores + i, extent);
      });
    }
  };

  // Numbers to choose the largest of; `end` is a multiple of kLanes, the lanes from `count` on are kLast.
  struct Ranks {
    float values[kt::kMostRouted + kLanes];
    int count, end;

    void close(int numbers) {
      count = numbers;
      end = (numbers + kLanes - 1) / kLanes * kLanes;
      for (int i = count; i < end; ++i) values[i] = kLast;
    }
    // The first of the largest, which is then out of the choice; -1 when all others are kLast.
    int take_best() {
      Vec best = Ops::load(values);
      for (int i = kLanes; i < end; i += kLanes) best = Ops::max(best, Ops::load(values + i));
      const float largest = largest_lane(best);
      if (largest == kLast) return -1;
      const Vec wanted = Ops::set(largest);
      for (int i = 0; i < end; i += kLanes) {
        const uint32_t equal = Ops::equal_lanes(Ops::load(values + i), wanted);
        if (equal == 0) continue;
        const int found = i + __builtin_ctz(equal);
        values[found] = kLast;
        return found;
      }
      return -1;
    }
  };

  static inline float without_nan(float x) { return x == x ? x : kLast; }

  // What experts rank by.
  static void rank(const kt::RouterArgs& a, const float* logits, const float* scores, Ranks* ranks) {
    for (int e = 0; e < a.experts; ++e) {
      ranks->values[e] = without_nan(a.bias == nullptr ? logits[e] : scores[e] + a.bias[e]);
    }
    ranks->close(a.experts);
  }

  static float rank_of_group(const float* experts, int count, kt::GroupRank by) {
    float best = kLast, second = kLast;
    for (int e = 0; e < count; ++e) {
      const float x = experts[e];
      second = x > best ? best : (x > second ? x : second);
      best = x > best ? x : best;
    }
    return by == kt::GroupRank::kBest || count == 1 ? best : best + second;
  }

  // Experts outside the best groups leave the choice.
  static void keep_groups(const kt::RouterArgs& a, Ranks* experts) {
    if (a.groups_kept >= a.groups) return;
    const int group = a.experts / a.groups;
    Ranks groups;
    for (int g = 0; g < a.groups; ++g) {
      groups.values[g] = without_nan(rank_of_group(experts->values + g * group, group, a.group_rank));
    }
    groups.close(a.groups);
    uint8_t kept[kt::kMostRouted] = {};
    for (int n = 0; n < a.groups_kept; ++n) {
      const int g = groups.take_best();
      if (g >= 0) kept[g] = 1;
    }
    for (int e = 0; e < a.experts; ++e) {
      if (!kept[e / group]) experts->values[e] = kLast;
    }
  }

  static int lowest_not_in(const int32_t* ids, int count) {
    for (int e = 0;; ++e) {
      bool taken = false;
      for (int i = 0; i < count; ++i) taken = taken || ids[i] == e;
      if (!taken) return e;
    }
  }

  static void choose(const kt::RouterArgs& a, const float* scores, Ranks* ranks, int64_t row) {
    int32_t* ids = a.ids + row * a.chosen;
    float* weights = a.weights + row * a.chosen;
    float sum = 0;
    for (int n = 0; n < a.chosen; ++n) {
      const int best = ranks->take_best();
      ids[n] = best >= 0 ? best : lowest_not_in(ids, n);
      weights[n] = scores[ids[n]];
      sum += weights[n];
    }
    const float divisor = a.renormalise ? sum + 1e-20f : 1.0f;
    for (int n = 0; n < a.chosen; ++n) weights[n] = weights[n] / divisor * a.scale;
  }

  template <class X, class Scoring>
  static void route(const kt::RouterArgs& a) {
    for (int64_t row = 0; row < a.rows; ++row) {
      float logits[kt::kMostRouted], scores[kt::kMostRouted];
      All::template widen<X>(a.logits + row * a.logits_stride, logits, a.experts);
      Scoring::scores(logits, a.experts, scores);
      Ranks ranks;
      rank(a, logits, scores, &ranks);
      keep_groups(a, &ranks);
      choose(a, scores, &ranks, row);
    }
  }
};

template <class Ops>
constexpr kt::RouterKernels make_router_kernels() {
  using R = Router<Ops>;
  using All = Elements<Ops>;
  using F = AsF32<Ops>;
  using B = AsBf16<Ops>;
  using H = AsF16<Ops>;
  using Softmax = typename R::Softmax;
  using Sigmoid = typename R::Sigmoid;
  return {{R::template route<F, Softmax>, R::template route<B, Softmax>, R::template route<H, Softmax>},
          {R::template route<F, Sigmoid>, R::template route<B, Sigmoid>, R::template route<H, Sigmoid>},
          {All::template widen<F>, All::template widen<B>, All::template widen<H>}};
}
