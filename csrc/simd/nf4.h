// Weights in NF4 decoded 32 at a time; included by the bodies that each.h compiles once per vector width.
//
// A block has 16 values: code times absmax, rounded once. They are computed once per block, as a table from which one
// or a few shuffles take 32 weights: of bytes with AVX2 (the values cut into planes of bytes), of floats or words with
// AVX-512. So every weight has the bits of one float product and one rounding, wherever it is used.
//
// The tables of a run of blocks are made before its weights are decoded: the steps from a packed absmax to a table take
// longer than a block's weights, and tables do not wait for one another.

#include "../nf4.h"

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

constexpr int kGroup = 32;  // no block is shorter, so a group has elements of at most two
constexpr int kGroupVectors = kGroup / kFloats;

// ---- absmax ----------------------------------------------------------------------------------------------------

// Double quantisation rounds twice. A compiler may contract a product that it sees to a fused multiply-add.
PEFT_KERNELS_INLINE float rounded_product(float a, float b) {
#if defined(__x86_64__)
  float product = a * b;
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  float product = a * b;
  __asm__("" : "+w"(product));
#else
  const volatile float product = a * b;
#endif
  return product;
}

// Any NaN as the quiet one, which rounding to bfloat16 by addition leaves a NaN.
PEFT_KERNELS_INLINE float nf4_absmax(const Nf4Weight& w, int64_t block) {
  float value;
  if (w.nested_absmax == nullptr) {
    value = static_cast<const float*>(w.absmax)[block];
  } else {
    const uint8_t index = static_cast<const uint8_t*>(w.absmax)[block];
    value = rounded_product(w.nested_map[index], w.nested_absmax[block >> kNf4NestedShift]) + *w.nested_offset;
  }
  if (__builtin_expect(value != value, 0)) return float_from_bits(0x7FC00000u);
  return value;
}

// ---- the 16 values of a block ----------------------------------------------------------------------------------

// The bits of `value` rounded to bfloat16, in the low halves. No NaN but the quiet one.
PEFT_KERNELS_INLINE Words bfloat16_bits(Floats value) {
  const Words bits = bits_as<Words>(value);
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

// `value` rounded to Type, as float.
template <class Type>
PEFT_KERNELS_INLINE Floats rounded(Floats value) {
  if constexpr (std::is_same_v<Type, Float32>) return value;
  if constexpr (std::is_same_v<Type, BFloat16>) return bits_as<Floats>(bfloat16_bits(value) << 16);
  if constexpr (std::is_same_v<Type, Float16>) {
    uint16_t halves[kFloats];
    Type::store_floats(halves, value);
    return Type::load_floats(halves);
  }
}

template <class Type>
PEFT_KERNELS_INLINE Floats nf4_values(const float* code, float absmax) {
  return rounded<Type>(load<Floats>(code) * splat(absmax));
}

// 32 weights as floats. Which of them slot s (lane s % kFloats of vector s / kFloats) holds is nf4_place(s): the order
// in which they come out of the shuffles. What they are multiplied with is brought into that order instead.
struct Group {
  Floats value[kGroupVectors];
};

#if PEFT_KERNELS_VECTOR_BYTES != 32

// The 16 values as floats.
template <class Type>
struct FloatTable {
  alignas(64) float values[16];

  PEFT_KERNELS_INLINE void make(float absmax) {
    for (int i = 0; i < 16; i += kFloats) store(values + i, nf4_values<Type>(kNf4Code + i, absmax));
  }
};

#endif

#if PEFT_KERNELS_VECTOR_BYTES == 32

constexpr int nf4_place(int slot) {
  return slot / 16 * 16 + slot / 8 % 2 * 2 + slot / 4 % 2 + slot % 4 * 4;
}

// The first byte's halves in the first bytes of both lanes: elements 0, 2, 4 ... in one, 1, 3, 5 ... in the other.
PEFT_KERNELS_INLINE __m256i even_odd_indices(Bytes16 bytes) {
  const __m256i twice = _mm256_broadcastsi128_si256(bits_as<__m128i>(bytes));
  const __m256i shifted = _mm256_srlv_epi32(twice, _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(15));
}

// The 16 values in 16 bits each, in order.
template <class Type>
PEFT_KERNELS_INLINE __m256i nf4_halves(float absmax) {
  if constexpr (std::is_same_v<Type, BFloat16>) {
    // Packing works lane by lane: the values are computed in an order that it makes right.
    constexpr const float* code = kNf4Code;
    const Floats first = _mm256_setr_ps(code[0], code[1], code[2], code[3], code[8], code[9], code[10], code[11]);
    const Floats second = _mm256_setr_ps(code[4], code[5], code[6], code[7], code[12], code[13], code[14], code[15]);
    const Words a = bfloat16_bits(first * splat(absmax)), b = bfloat16_bits(second * splat(absmax));
    return _mm256_packus_epi32(bits_as<__m256i>(a), bits_as<__m256i>(b));
  } else {
    const Floats a = load<Floats>(kNf4Code) * splat(absmax), b = load<Floats>(kNf4Code + 8) * splat(absmax);
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
    return _mm256_set_m128i(_mm256_cvtps_ph(b, nearest), _mm256_cvtps_ph(a, nearest));
  }
}

// A plane of 16 bytes in both lanes.
PEFT_KERNELS_INLINE __m256i load_plane(const uint8_t* plane) {
  return _mm256_broadcastsi128_si256(load<__m128i>(plane));
}

// The 16 values of 16 bits as a plane of their low bytes and one of the high ones.
template <class Type>
struct HalfTable {
  alignas(32) uint8_t planes[32];

  PEFT_KERNELS_INLINE void make(float absmax) {
    const __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                           0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    store(planes, _mm256_permute4x64_epi64(_mm256_shuffle_epi8(nf4_halves<Type>(absmax), apart), 0xD8));
  }
};

struct TwoVectors {
  __m256i first, second;
};

struct HalfPlanes {
  __m256i low, high;

  template <class Type>
  PEFT_KERNELS_INLINE explicit HalfPlanes(const HalfTable<Type>& table)
      : low(load_plane(table.planes)), high(load_plane(table.planes + 16)) {}

  // Words of the elements at indices 0..7 and 8..15 of each lane.
  PEFT_KERNELS_INLINE TwoVectors words(__m256i indices) const {
    const __m256i lows = _mm256_shuffle_epi8(low, indices), highs = _mm256_shuffle_epi8(high, indices);
    return {_mm256_unpacklo_epi8(lows, highs), _mm256_unpackhi_epi8(lows, highs)};
  }
};

// Floats of which two vectors hold the low and the high words: those at even places, and those at odd places.
PEFT_KERNELS_INLINE Floats even_words(__m256i low, __m256i high) {
  return bits_as<Floats>(_mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA));
}
PEFT_KERNELS_INLINE Floats odd_words(__m256i low, __m256i high) {
  return bits_as<Floats>(_mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xAA));
}

// The 16 values as floats: four planes of bytes.
template <class Type>
struct FloatTable {
  alignas(64) uint8_t planes[64];

  PEFT_KERNELS_INLINE void make(float absmax) {
    // Of four values each 32-bit lane gets the bytes of one significance.
    const __m256i apart = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                           0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i a = _mm256_shuffle_epi8(bits_as<__m256i>(nf4_values<Type>(kNf4Code, absmax)), apart);
    const __m256i b = _mm256_shuffle_epi8(bits_as<__m256i>(nf4_values<Type>(kNf4Code + 8, absmax)), apart);
    const __m256i zip = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    store(planes, _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi32(a, b), zip));
    store(planes + 32, _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi32(a, b), zip));
  }
};

template <class Type>
struct Decoder {
  using Table = FloatTable<Type>;
  __m256i plane[4];

  PEFT_KERNELS_INLINE explicit Decoder(const Table& table) {
    unrolled<4>([&](auto i) { plane[i] = load_plane(table.planes + 16 * i); });
  }

  PEFT_KERNELS_INLINE Group operator()(Bytes16 bytes) const {
    const __m256i indices = even_odd_indices(bytes);
    const __m256i byte0 = _mm256_shuffle_epi8(plane[0], indices), byte1 = _mm256_shuffle_epi8(plane[1], indices);
    const __m256i byte2 = _mm256_shuffle_epi8(plane[2], indices), byte3 = _mm256_shuffle_epi8(plane[3], indices);
    const __m256i low0 = _mm256_unpacklo_epi8(byte0, byte1), high0 = _mm256_unpacklo_epi8(byte2, byte3);
    const __m256i low1 = _mm256_unpackhi_epi8(byte0, byte1), high1 = _mm256_unpackhi_epi8(byte2, byte3);
    return {{even_words(low0, high0), odd_words(low0, high0), even_words(low1, high1), odd_words(low1, high1)}};
  }
};

// A bfloat16 is the high half of its float.
template <>
struct Decoder<BFloat16> {
  using Table = HalfTable<BFloat16>;
  HalfPlanes planes;

  PEFT_KERNELS_INLINE explicit Decoder(const Table& table) : planes(table) {}

  PEFT_KERNELS_INLINE Group operator()(Bytes16 bytes) const {
    const auto [first, second] = planes.words(even_odd_indices(bytes));
    const Words a = bits_as<Words>(first), b = bits_as<Words>(second);
    return {{bits_as<Floats>(a << 16), bits_as<Floats>(a & 0xFFFF0000u), bits_as<Floats>(b << 16),
             bits_as<Floats>(b & 0xFFFF0000u)}};
  }
};

PEFT_KERNELS_INLINE void store_in_order(const Group& group, float* target) {
  const __m256i zip = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  unrolled<2>([&](auto i) {
    const Floats low = _mm256_unpacklo_ps(group.value[2 * i], group.value[2 * i + 1]);
    const Floats high = _mm256_unpackhi_ps(group.value[2 * i], group.value[2 * i + 1]);
    store(target + 16 * i, _mm256_permutevar8x32_ps(low, zip));
    store(target + 16 * i + 8, _mm256_permutevar8x32_ps(high, zip));
  });
}

// 32 weights of 16 bits, in order, into memory.
template <class Type>
struct HalfWriter {
  using Table = HalfTable<Type>;
  HalfPlanes planes;

  PEFT_KERNELS_INLINE explicit HalfWriter(const Table& table) : planes(table) {}

  PEFT_KERNELS_INLINE void put(Bytes16 bytes, uint16_t* target) const {
    const __m256i wide = _mm256_cvtepu8_epi16(bits_as<__m128i>(bytes));
    const __m256i spread = _mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8));
    const auto [first, second] = planes.words(_mm256_and_si256(spread, _mm256_set1_epi8(15)));
    store(target, _mm256_permute2x128_si256(first, second, 0x20));
    store(target + 16, _mm256_permute2x128_si256(first, second, 0x31));
  }
};

#elif PEFT_KERNELS_VECTOR_BYTES == 64

constexpr int nf4_place(int slot) { return slot % 16 * 2 + slot / 16; }

template <class Type>
struct Decoder {
  using Table = FloatTable<Type>;
  __m512 values;

  PEFT_KERNELS_INLINE explicit Decoder(const Table& table) : values(load<__m512>(table.values)) {}

  PEFT_KERNELS_INLINE Group operator()(Bytes16 bytes) const {
    const __m512i pairs = _mm512_cvtepu8_epi32(bits_as<__m128i>(bytes));
    const __m512i evens = bits_as<__m512i>(bits_as<Words>(pairs) >> 4);
    // The permutation looks at the low 4 bits of an index only.
    return {{_mm512_permutexvar_ps(evens, values), _mm512_permutexvar_ps(pairs, values)}};
  }
};

PEFT_KERNELS_INLINE void store_in_order(const Group& group, float* target) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  store(target, _mm512_permutex2var_ps(group.value[0], low, group.value[1]));
  store(target + 16, _mm512_permutex2var_ps(group.value[0], high, group.value[1]));
}

// The 16 values in 16 bits each, twice.
template <class Type>
struct HalfTable {
  alignas(64) uint16_t values[32];

  PEFT_KERNELS_INLINE void make(float absmax) {
    const Floats products = load<Floats>(kNf4Code) * splat(absmax);
    Halves halves;
    if constexpr (std::is_same_v<Type, BFloat16>) halves = __builtin_convertvector(bfloat16_bits(products), Halves);
    else halves = bits_as<Halves>(_mm512_maskz_cvtps_ph(0xFFFF, products, _MM_FROUND_TO_NEAREST_INT));
    store(values, halves);
    store(values + 16, halves);
  }
};

template <class Type>
struct HalfWriter {
  using Table = HalfTable<Type>;
  __m512i values;

  PEFT_KERNELS_INLINE explicit HalfWriter(const Table& table) : values(load<__m512i>(table.values)) {}

  PEFT_KERNELS_INLINE void put(Bytes16 bytes, uint16_t* target) const {
    const Words pairs = bits_as<Words>(_mm512_cvtepu8_epi32(bits_as<__m128i>(bytes)));
    // An odd element's index keeps one bit of its neighbour: both copies of the values answer it.
    store(target, _mm512_permutexvar_epi16(bits_as<__m512i>((pairs >> 4) | (pairs << 16)), values));
  }
};

#else

constexpr int nf4_place(int slot) { return slot; }

template <class Type>
struct Decoder {
  using Table = FloatTable<Type>;
  const float* table;

  PEFT_KERNELS_INLINE explicit Decoder(const Table& table) : table(table.values) {}

  PEFT_KERNELS_INLINE Group operator()(Bytes16 bytes) const {
    float values[kGroup];
    for (int i = 0; i < 16; ++i) {
      values[2 * i] = table[bytes[i] >> 4];
      values[2 * i + 1] = table[bytes[i] & 15];
    }
    return load<Group>(values);
  }
};

PEFT_KERNELS_INLINE void store_in_order(const Group& group, float* target) { store(target, group); }

template <class Type>
struct HalfTable {
  alignas(32) uint16_t values[16];

  PEFT_KERNELS_INLINE void make(float absmax) {
    for (int i = 0; i < 16; i += kFloats) Type::store_floats(values + i, nf4_values<Float32>(kNf4Code + i, absmax));
  }
};

template <class Type>
struct HalfWriter {
  using Table = HalfTable<Type>;
  const uint16_t* table;

  PEFT_KERNELS_INLINE explicit HalfWriter(const Table& table) : table(table.values) {}

  PEFT_KERNELS_INLINE void put(Bytes16 bytes, uint16_t* target) const {
    for (int i = 0; i < 16; ++i) {
      target[2 * i] = table[bytes[i] >> 4];
      target[2 * i + 1] = table[bytes[i] & 15];
    }
  }
};

#endif

// 32 floats in order into memory.
struct FloatWriter {
  using Table = Decoder<Float32>::Table;
  Decoder<Float32> decoder;

  PEFT_KERNELS_INLINE explicit FloatWriter(const Table& table) : decoder(table) {}
  PEFT_KERNELS_INLINE void put(Bytes16 bytes, float* target) const { store_in_order(decoder(bytes), target); }
};

// ---- runs of elements ------------------------------------------------------------------------------------------

// The 32 elements from number `first` on, which is odd or even: as bytes of their own, the earlier one in the high half.
template <bool odd>
PEFT_KERNELS_INLINE Bytes16 load_group(const uint8_t* packed, int64_t first) {
  const uint8_t* source = packed + (first >> 1);
  if constexpr (!odd) return load<Bytes16>(source);
  return (load<Bytes16>(source) << 4) | (load<Bytes16>(source + 1) >> 4);
}

// The `count` <= 32 elements from number `first` on; the others' indices are 0. Bytes without any of them are not read.
PEFT_KERNELS_INLINE Bytes16 load_some(const uint8_t* packed, int64_t first, int64_t count) {
  const bool odd = first & 1;
  if (count == kGroup) return odd ? load_group<true>(packed, first) : load_group<false>(packed, first);
  uint8_t some[kGroup] = {};
  std::memcpy(some, packed + (first >> 1), static_cast<size_t>((count + odd + 1) >> 1));
  return odd ? load_group<true>(some, 1) : load_group<false>(some, 0);
}

// Calls use(i, bytes) for whole groups of a run from number `first` on, from i on to where none fits before `end`.
template <class Use>
PEFT_KERNELS_INLINE int64_t for_whole_groups(const uint8_t* packed, int64_t first, int64_t i, int64_t end, Use use) {
  if (first & 1)
    for (; i + kGroup <= end; i += kGroup) use(i, load_group<true>(packed, first + i));
  else
    for (; i + kGroup <= end; i += kGroup) use(i, load_group<false>(packed, first + i));
  return i;
}

// Of `group` the elements before `count`, of `others` those from there on.
PEFT_KERNELS_INLINE Group joined(const Group& group, const Group& others, int64_t count) {
  Group result;
  unrolled<kGroupVectors>([&](auto v) {
    int32_t places[kFloats];
    for (int lane = 0; lane < kFloats; ++lane) places[lane] = nf4_place(v * kFloats + lane);
    const Ints ours = load<Ints>(places) < static_cast<int32_t>(count) + Ints{};
    const Ints a = bits_as<Ints>(group.value[v]), b = bits_as<Ints>(others.value[v]);
    result.value[v] = bits_as<Floats>((a & ours) | (b & ~ours));
  });
  return result;
}

constexpr int64_t kNf4Run = 4096;  // the most elements of a run, so that its tables fit the L1 cache

// The most blocks that `count` elements have a part in.
constexpr int64_t blocks_of(int64_t count) { return count / kGroup + 2; }

template <class Table>
PEFT_KERNELS_INLINE void make_tables(const Nf4Weight& w, int64_t first, int64_t count, Table* tables) {
  const int64_t begin = first >> w.shift, end = ((first + count - 1) >> w.shift) + 1;
  for (int64_t block = begin; block < end; ++block) tables[block - begin].make(nf4_absmax(w, block));
}

// Walks a run block by block: whole(block, i, end) for the groups from i on that end at or before `end`, returning
// where it stopped; edge(block, i, rest, size) for a group of `size` elements of which the first `rest` are the block's
// and the others the next one's. Blocks count from that of the first element, i and end from `first`.
template <class Whole, class Edge>
PEFT_KERNELS_INLINE void walk(int shift, int64_t first, int64_t count, Whole whole, Edge edge) {
  const int64_t begin = first >> shift;
  for (int64_t i = 0, block = 0; i < count; ++block) {
    const int64_t end = std::min(count, ((begin + block + 1) << shift) - first);
    i = whole(block, i, end);
    if (i == end) continue;
    edge(block, i, end - i, std::min<int64_t>(kGroup, count - i));
    i += kGroup;
  }
}

// Calls use(i, group) for the `count` elements from number `first` on, 32 at a time; what the last group has beyond them
// is zero. `tables` are those of their blocks.
template <class Type, class Use>
PEFT_KERNELS_INLINE void for_groups(const Nf4Weight& w, const typename Decoder<Type>::Table* tables, int64_t first,
                                    int64_t count, Use use) {
  const uint8_t* packed = w.packed;
  walk(
      w.shift, first, count,
      [&](int64_t block, int64_t i, int64_t end) {
        const Decoder<Type> decoder(tables[block]);
        return for_whole_groups(packed, first, i, end, [&](int64_t at, Bytes16 bytes) { use(at, decoder(bytes)); });
      },
      [&](int64_t block, int64_t i, int64_t rest, int64_t size) {
        const Bytes16 bytes = load_some(packed, first + i, size);
        Group group = Decoder<Type>(tables[block])(bytes);
        if (rest < size) group = joined(group, Decoder<Type>(tables[block + 1])(bytes), rest);
        use(i, joined(group, Group{}, size));
      });
}

// `count` <= kNf4Run elements from number `first` on into memory, in order.
template <class Writer, class Storage>
PEFT_KERNELS_INLINE void write_run(const Nf4Weight& w, int64_t first, int64_t count, Storage* target) {
  typename Writer::Table tables[blocks_of(kNf4Run)];
  make_tables(w, first, count, tables);
  const uint8_t* packed = w.packed;
  walk(
      w.shift, first, count,
      [&](int64_t block, int64_t i, int64_t end) {
        const Writer writer(tables[block]);
        return for_whole_groups(packed, first, i, end,
                                [&](int64_t at, Bytes16 bytes) { writer.put(bytes, target + at); });
      },
      [&](int64_t block, int64_t i, int64_t rest, int64_t size) {
        const Bytes16 bytes = load_some(packed, first + i, size);
        Storage some[kGroup];
        Writer(tables[block]).put(bytes, some);
        std::memcpy(target + i, some, static_cast<size_t>(std::min(rest, size)) * sizeof(Storage));
        if (rest >= size) return;
        Writer(tables[block + 1]).put(bytes, some);
        std::memcpy(target + i + rest, some + rest, static_cast<size_t>(size - rest) * sizeof(Storage));
      });
}
