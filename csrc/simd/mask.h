// Masks of one bit an element, 32 to a word; included by each.h once per vector width. The format:
// peft_kernels/formats/mask.py.

constexpr int kWordBits = 32;
constexpr int kWordVectors = kWordBits / kFloats;  // vectors of floats that a word says which to keep

template <class Vector, int first, int step, int... lanes>
constexpr Vector flags(std::integer_sequence<int, lanes...>) {
  return Vector{(1ull << (first + step * lanes))...};
}

// 1 << (first + step * lane), of as many lanes of 32 or 64 bits as a vector has.
template <class Vector, int first, int step = 1>
PEFT_KERNELS_INLINE Vector flags() {
  return flags<Vector, first, step>(std::make_integer_sequence<int, sizeof(Vector) / sizeof(Vector{}[0])>{});
}

// All ones in the lanes whose flag the word has.
template <class Vector>
PEFT_KERNELS_INLINE Vector where(Vector word, Vector flag) {
  return bits_as<Vector>((word & flag) == flag);
}

// A choice, not a product: what is not kept is 0, also where it was infinite or NaN.
template <int vector>
PEFT_KERNELS_INLINE Floats kept(Floats value, Words word) {
  return bits_as<Floats>(bits_as<Words>(value) & where(word, flags<Words, vector * kFloats>()));
}

// ---- elements as they are, by their size in bytes ----------------------------------------------------------------

// The kept ones of 32 elements.
PEFT_KERNELS_INLINE void keep(const uint32_t* source, uint32_t word, uint32_t* target) {
  const Words all = word + Words{};
  unrolled<kWordVectors>([&](auto v) {
    store(target + v * kFloats, load<Words>(source + v * kFloats) & where(all, flags<Words, v * kFloats>()));
  });
}

// Two elements to a lane of 32 bits: a lane of 16 has no bit for the upper half of a word.
PEFT_KERNELS_INLINE void keep(const uint16_t* source, uint32_t word, uint16_t* target) {
  const Words all = word + Words{};
  unrolled<kWordVectors / 2>([&](auto v) {
    constexpr int first = v * 2 * kFloats;
    const Words low = where(all, flags<Words, first, 2>()), high = where(all, flags<Words, first + 1, 2>());
    store(target + first, load<Words>(source + first) & ((low & 0xFFFFu) | (high & 0xFFFF0000u)));
  });
}

PEFT_KERNELS_INLINE void keep(const uint64_t* source, uint32_t word, uint64_t* target) {
  const Longs all = word + Longs{};
  unrolled<kWordBits / kCounters>([&](auto v) {
    const Longs value = load<Longs>(source + v * kCounters);
    store(target + v * kCounters, value & where(all, flags<Longs, v * kCounters>()));
  });
}

// Calls some(source, word, target) for 32 elements at a time, for the last ones on copies.
template <class From, class To, class Some>
PEFT_KERNELS_INLINE void by_word(const From* source, const uint32_t* words, int64_t columns, To* target, Some some) {
  int64_t i = 0;
  for (; i + kWordBits <= columns; i += kWordBits) some(source + i, words[i / kWordBits], target + i);
  if (i == columns) return;
  From last[kWordBits] = {};
  To made[kWordBits];
  std::memcpy(last, source + i, (columns - i) * sizeof(From));
  some(last, words[i / kWordBits], made);
  std::memcpy(target + i, made, (columns - i) * sizeof(To));
}

template <class Unit>
inline void keep_row(const void* source, const uint32_t* words, int64_t columns, void* target) {
  by_word(static_cast<const Unit*>(source), words, columns, static_cast<Unit*>(target),
          [](const Unit* from, uint32_t word, Unit* to) { keep(from, word, to); });
}

template <class From, class To>
inline void convert_row(const void* source, const uint32_t* words, int64_t columns, void* target) {
  using Source = typename From::Storage;
  using Target = typename To::Storage;
  by_word(static_cast<const Source*>(source), words, columns, static_cast<Target*>(target),
          [](const Source* from, uint32_t word, Target* to) {
            const Words all = word + Words{};
            unrolled<kWordVectors>([&](auto v) {
              To::store_floats(to + v * kFloats, kept<v>(From::load_floats(from + v * kFloats), all));
            });
          });
}

// target [columns] = the kept ones of source in another dtype or the same; target may be source. `words` begins with
// that of the first column.
inline void mask_row(const void* source, int dtype, const uint32_t* words, int64_t columns, void* target,
                     int target_dtype) {
  if (dtype == target_dtype) {
    if (element_size(dtype) == 2) return keep_row<uint16_t>(source, words, columns, target);
    if (element_size(dtype) == 4) return keep_row<uint32_t>(source, words, columns, target);
    return keep_row<uint64_t>(source, words, columns, target);
  }
  with_type(dtype, [&](auto from) {
    with_type(target_dtype,
              [&](auto to) { convert_row<decltype(from), decltype(to)>(source, words, columns, target); });
  });
}

// ---- making and reading masks ------------------------------------------------------------------------------------

PEFT_KERNELS_INLINE uint32_t any_lane(Words value) {
  uint32_t lanes[kFloats], all = 0;
  store(lanes, value);
  for (int i = 0; i < kFloats; ++i) all |= lanes[i];
  return all;
}

// Words of the values of a row that are not 0, or of those above `threshold` (null: none) by value or magnitude.
template <class Type>
inline void pack_floats(const typename Type::Storage* values, int64_t columns, const float* threshold, bool magnitude,
                        uint32_t* words) {
  const Floats limit = splat(threshold ? *threshold : 0.0f);
  const Words sign = (magnitude ? 0x7FFFFFFFu : 0xFFFFFFFFu) + Words{};
  const auto word_of = [&](const typename Type::Storage* some) {
    Words bits{};
    unrolled<kWordVectors>([&](auto v) {
      const Floats value = bits_as<Floats>(bits_as<Words>(Type::load_floats(some + v * kFloats)) & sign);
      bits |= (threshold ? bits_as<Words>(value > limit) : bits_as<Words>(value != limit)) &
              flags<Words, v * kFloats>();
    });
    return any_lane(bits);
  };
  int64_t i = 0;
  for (; i + kWordBits <= columns; i += kWordBits) words[i / kWordBits] = word_of(values + i);
  if (i == columns) return;
  typename Type::Storage last[kWordBits] = {};
  std::memcpy(last, values + i, (columns - i) * sizeof *values);
  words[i / kWordBits] = word_of(last) & ((1u << (columns - i)) - 1);  // 0 may be above a threshold
}

// 8 bytes as the bits of whether they are 0. The factor brings bit 8 j to bit 56 + j; nothing else gets there.
inline uint32_t bits_of_bytes(uint64_t bytes) {
  constexpr uint64_t low = 0x7F7F7F7F7F7F7F7Full;
  const uint64_t ones = ((((bytes & low) + low) | bytes) & ~low) >> 7;
  return static_cast<uint32_t>((ones * 0x0102040810204080ull) >> 56);
}

inline void pack_bytes(const uint8_t* values, int64_t columns, uint32_t* words) {
  for (int64_t i = 0; i < columns; i += kWordBits) {
    uint64_t some[4] = {};
    std::memcpy(some, values + i, std::min<int64_t>(kWordBits, columns - i));
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j) word |= bits_of_bytes(some[j]) << (8 * j);
    words[i / kWordBits] = word;
  }
}

// Bytes of 0 and 1: in byte j only bit j of the 8 is left, and the addition carries it to the byte's top bit.
inline uint64_t bytes_of_bits(uint64_t bits) {
  const uint64_t spread = (bits * 0x0101010101010101ull) & 0x8040201008040201ull;
  return ((spread + 0x7F7F7F7F7F7F7F7Full) >> 7) & 0x0101010101010101ull;
}

inline void unpack_bytes(const uint32_t* words, int64_t columns, uint8_t* target) {
  for (int64_t i = 0; i < columns; i += kWordBits) {
    const uint32_t word = words[i / kWordBits];
    uint64_t some[4];
    for (int j = 0; j < 4; ++j) some[j] = bytes_of_bits(word >> (8 * j) & 0xFFu);
    std::memcpy(target + i, some, std::min<int64_t>(kWordBits, columns - i));
  }
}

inline void mask_pack_row(const void* values, int dtype, int64_t columns, const float* threshold, bool magnitude,
                          uint32_t* words) {
  if (dtype == kByte) return pack_bytes(static_cast<const uint8_t*>(values), columns, words);
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    pack_floats<Type>(static_cast<const typename Type::Storage*>(values), columns, threshold, magnitude, words);
  });
}

inline void mask_unpack_row(const uint32_t* words, int64_t columns, uint8_t* target) {
  unpack_bytes(words, columns, target);
}
