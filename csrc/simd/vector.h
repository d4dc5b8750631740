// Vectors of PEFT_KERNELS_VECTOR_BYTES bytes: loads and stores of every element type, and Philox on several counters
// at once. Included by each.h inside a namespace per width; no include guard on purpose.

constexpr int kFloats = PEFT_KERNELS_VECTOR_BYTES / 4;    // float lanes of a vector
constexpr int kCounters = PEFT_KERNELS_VECTOR_BYTES / 8;  // 64-bit lanes of a vector

typedef float Floats __attribute__((vector_size(PEFT_KERNELS_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(PEFT_KERNELS_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(PEFT_KERNELS_VECTOR_BYTES)));
typedef uint64_t Longs __attribute__((vector_size(PEFT_KERNELS_VECTOR_BYTES)));
typedef uint16_t Lanes __attribute__((vector_size(PEFT_KERNELS_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(PEFT_KERNELS_VECTOR_BYTES / 2)));
typedef int16_t ShortMask __attribute__((vector_size(PEFT_KERNELS_VECTOR_BYTES / 2)));

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <class Vector>
inline Vector load(const void* source) {
  Vector value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

template <class Vector>
inline void store(void* target, Vector value) {
  std::memcpy(target, &value, sizeof value);
}

inline Floats splat(float value) { return value - Floats{}; }

// f(0), f(1), ... with constant arguments. A loop would be unrolled too late for an array of accumulators that it indexes
// to be kept in registers.
template <class Function, int... indices>
PEFT_KERNELS_INLINE void unroll(Function f, std::integer_sequence<int, indices...>) {
  (f(std::integral_constant<int, indices>{}), ...);
}

template <int count, class Function>
PEFT_KERNELS_INLINE void unrolled(Function f) {
  unroll(f, std::make_integer_sequence<int, count>{});
}

// ---- quads -----------------------------------------------------------------------------------------------------

#if defined(__clang__)
#define PEFT_KERNELS_SHUFFLE(Lanes, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PEFT_KERNELS_SHUFFLE(Lanes, a, b, ...) __builtin_shuffle(a, b, Lanes{__VA_ARGS__})
#endif

// The vectors' quads of four floats are what their shuffles do not leave. Of each quad of a and b the lower (or upper)
// halves, `run` floats of one after `run` of the other.
template <int upper, int run, int... lanes>
inline Floats zip(Floats a, Floats b, std::integer_sequence<int, lanes...>) {
  return PEFT_KERNELS_SHUFFLE(
      Ints, a, b,
      (lanes / 4 * 4 + 2 * upper + lanes % 4 / (2 * run) * run + lanes % run + lanes % 4 / run % 2 * kFloats)...);
}

template <int upper, int run>
PEFT_KERNELS_INLINE Floats zip(Floats a, Floats b) {
  return zip<upper, run>(a, b, std::make_integer_sequence<int, kFloats>{});
}

// Transposes the 4 x 4 blocks that the quads of four vectors are.
PEFT_KERNELS_INLINE void transpose_quads(Floats (&rows)[4]) {
  const Floats low01 = zip<0, 1>(rows[0], rows[1]), high01 = zip<1, 1>(rows[0], rows[1]);
  const Floats low23 = zip<0, 1>(rows[2], rows[3]), high23 = zip<1, 1>(rows[2], rows[3]);
  rows[0] = zip<0, 2>(low01, low23);
  rows[1] = zip<1, 2>(low01, low23);
  rows[2] = zip<0, 2>(high01, high23);
  rows[3] = zip<1, 2>(high01, high23);
}

typedef float Quad __attribute__((vector_size(16)));

// Quads `stride` floats apart, side by side.
PEFT_KERNELS_INLINE Floats load_quads(const float* source, int64_t stride) {
#if PEFT_KERNELS_VECTOR_BYTES == 32
  return _mm256_insertf128_ps(_mm256_castps128_ps256(load<Quad>(source)), load<Quad>(source + stride), 1);
#elif PEFT_KERNELS_VECTOR_BYTES == 64
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(load<Quad>(source)), load<Quad>(source + stride), 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(load<Quad>(source + 2 * stride)),
                                           load<Quad>(source + 3 * stride), 1);
  return _mm512_insertf32x8(_mm512_insertf32x8(Floats{}, low, 0), high, 1);
#else
  (void)stride;
  return load<Floats>(source);
#endif
}

// The sum of a vector's quads.
PEFT_KERNELS_INLINE Quad sum_quads(Floats value) {
#if PEFT_KERNELS_VECTOR_BYTES == 32
  return _mm256_castps256_ps128(value) + _mm256_extractf128_ps(value, 1);
#elif PEFT_KERNELS_VECTOR_BYTES == 64
  const __m256 half = _mm512_maskz_extractf32x8_ps(0xFF, value, 0) + _mm512_maskz_extractf32x8_ps(0xFF, value, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#else
  return value;
#endif
}

PEFT_KERNELS_INLINE float sum_lanes(Floats value) {
  float lanes[kFloats];
  store(lanes, value);
  for (int half = kFloats / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// ---- element types ---------------------------------------------------------------------------------------------

struct Float32 {
  using Storage = float;
  static Floats load_floats(const float* source) { return load<Floats>(source); }
  static void store_floats(float* target, Floats value) { store(target, value); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static Floats load_floats(const uint16_t* source) {
    return bits_as<Floats>(__builtin_convertvector(load<Halves>(source), Words) << 16);
  }
  static void store_floats(uint16_t* target, Floats value) {
    const Words bits = bits_as<Words>(value);
    const Words nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Words quiet = (bits >> 16) | 0x0040u;
    store(target, __builtin_convertvector((rounded & ~nan) | (quiet & nan), Halves));
  }
};

struct Float16 {
  using Storage = uint16_t;
#if PEFT_KERNELS_VECTOR_BYTES == 32
  static Floats load_floats(const uint16_t* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }
  static void store_floats(uint16_t* target, Floats value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif PEFT_KERNELS_VECTOR_BYTES == 64
  static Floats load_floats(const uint16_t* source) {
    // The forms without a mask start from an undefined register, of which gcc 12 warns.
    return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }
  static void store_floats(uint16_t* target, Floats value) {
    const __m256i halves = _mm512_maskz_cvtps_ph(0xFFFF, value, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), halves);
  }
#else
  static Floats load_floats(const uint16_t* source) {
    Floats value;
    for (int i = 0; i < kFloats; ++i) value[i] = float_from_float16(source[i]);
    return value;
  }
  static void store_floats(uint16_t* target, Floats value) {
    for (int i = 0; i < kFloats; ++i) target[i] = float16_from_float(value[i]);
  }
#endif
};

// Calls visit(Float32{}), visit(BFloat16{}) or visit(Float16{}).
template <class Visitor>
inline void with_type(int dtype, Visitor visit) {
  if (dtype == kFloat32) visit(Float32{});
  if (dtype == kBFloat16) visit(BFloat16{});
  if (dtype == kFloat16) visit(Float16{});
}

// ---- Philox ----------------------------------------------------------------------------------------------------

// Products of the low 32 bits of each 64-bit lane; whatever the high halves hold is ignored.
inline Longs multiply_low_words(Longs a, Longs b) {
#if PEFT_KERNELS_X86 && PEFT_KERNELS_VECTOR_BYTES == 16
  return bits_as<Longs>(_mm_mul_epu32(bits_as<__m128i>(a), bits_as<__m128i>(b)));
#elif PEFT_KERNELS_VECTOR_BYTES == 32
  return bits_as<Longs>(_mm256_mul_epu32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#elif PEFT_KERNELS_VECTOR_BYTES == 64
  return bits_as<Longs>(_mm512_mul_epu32(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// a0 b0 a2 b2 ... or, with `odd`, a1 b1 a3 b3 ...
template <int odd>
inline Longs interleave(Longs a, Longs b) {
#if PEFT_KERNELS_VECTOR_BYTES == 16
  return PEFT_KERNELS_SHUFFLE(Longs, a, b, odd, 2 + odd);
#elif PEFT_KERNELS_VECTOR_BYTES == 32
  return PEFT_KERNELS_SHUFFLE(Longs, a, b, odd, 4 + odd, 2 + odd, 6 + odd);
#else
  return PEFT_KERNELS_SHUFFLE(Longs, a, b, odd, 8 + odd, 2 + odd, 10 + odd, 4 + odd, 12 + odd, 6 + odd, 14 + odd);
#endif
}

// Every 64-bit lane holds a word of one counter in its low half; the high halves are rubbish that no step reads.
struct PhiloxState {
  Longs c0, c1, c2, c3;

  // Lane order in which `interleave` brings the counters back into sequence.
  explicit PhiloxState(uint64_t counter) : c2{}, c3{} {
    uint64_t first[kCounters];
    for (int i = 0; i < kCounters; ++i) first[i] = counter + (i >> 1) + (i & 1) * (kCounters / 2);
    c0 = load<Longs>(first);
    c1 = c0 >> 32;
  }

  void round(Longs key0, Longs key1) {
    const Longs product0 = multiply_low_words(c0, kPhiloxMultiplier0 + Longs{});
    const Longs product1 = multiply_low_words(c2, kPhiloxMultiplier1 + Longs{});
    c0 = (product1 >> 32) ^ c1 ^ key0;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ key1;
    c3 = product0;
  }

  // 8 masks (0 or -1) for each of the counters, in order.
  void store_masks(Lanes threshold, int16_t* masks) const {
    const Longs words01 = (c0 & 0xFFFFFFFFu) | (c1 << 32), words23 = (c2 & 0xFFFFFFFFu) | (c3 << 32);
    store(masks, bits_as<Lanes>(interleave<0>(words01, words23)) >= threshold);
    store(masks + 4 * kCounters, bits_as<Lanes>(interleave<1>(words01, words23)) >= threshold);
  }
};

// The key of every round, splatted once per run of counters.
struct PhiloxKeys {
  Longs key0[kPhiloxRounds], key1[kPhiloxRounds];

  explicit PhiloxKeys(uint64_t seed) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, low += kPhiloxWeyl0, high += kPhiloxWeyl1) {
      key0[round] = low + Longs{};
      key1[round] = high + Longs{};
    }
  }
};

constexpr int kMaskStep = 2 * kCounters;  // counters of one step: two independent chains hide the multiplies' latency

// Masks (0 or -1) of `groups` counters, 8 each. `masks` has room for `groups` rounded up to kMaskStep.
inline void keep_masks(const PhiloxKeys& keys, uint64_t counter, int64_t groups, uint32_t threshold, int16_t* masks) {
  if (threshold > 0xFFFFu) {  // does not fit a lane: nothing is kept
    std::memset(masks, 0, groups * kPhiloxLanes * sizeof(int16_t));
    return;
  }
  const Lanes limit = static_cast<uint16_t>(threshold) + Lanes{};
  for (int64_t group = 0; group < groups; group += kMaskStep) {
    PhiloxState first(counter + group), second(counter + group + kCounters);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      first.round(keys.key0[round], keys.key1[round]);
      second.round(keys.key0[round], keys.key1[round]);
    }
    first.store_masks(limit, masks + group * kPhiloxLanes);
    second.store_masks(limit, masks + (group + kCounters) * kPhiloxLanes);
  }
}

inline Floats masked(Floats value, const int16_t* masks) {
  return bits_as<Floats>(bits_as<Ints>(value) & __builtin_convertvector(load<ShortMask>(masks), Ints));
}
