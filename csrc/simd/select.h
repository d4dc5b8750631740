// Numbers as integers of the same order, counted by their digits and compared; included by each.h once per vector width.

#include "mask.h"

constexpr int32_t kNanKey = -0x7F000003;  // the lowest that occurs; -infinity has the next one but one

// As `_keys` of pruning/thresholds.py: -0 is 0, and all NaNs are one, below the numbers.
PEFT_KERNELS_INLINE Ints keys_of(const float* source) {
  Ints bits = load<Ints>(source);
  bits &= ~(bits == std::numeric_limits<int32_t>::min());
  bits ^= (bits >> 31) & 0x7FFFFFFF;
  bits = bits_as<Ints>(bits_as<Words>(bits) + (0x7FFFFFFFu - 0x7F800000u));
  const Ints nan = bits < kNanKey;
  return (bits & ~nan) | (nan & kNanKey);
}

// Four counters for each digit, and for what does not count: one alone would wait for itself where digits repeat.
inline void select_count_piece(const float* data, int64_t count, int top, int low, int32_t prefix, uint32_t* counts) {
  constexpr int64_t kPiece = 256;
  const uint32_t bins = 1u << (top - low), flip = top == 32 ? bins / 2 : 0;
  alignas(64) uint32_t digits[kPiece];
  float last[kPiece];
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t size = std::min(kPiece, count - i);
    const float* from = data + i;
    if (size < kPiece) {
      std::memset(last, 0, sizeof last);
      std::memcpy(last, from, size * sizeof(float));
      from = last;
    }
    for (int64_t j = 0; j < kPiece; j += kFloats) {
      const Ints keys = keys_of(from + j);
      Words digit = (bits_as<Words>(keys >> low) & (bins - 1)) ^ flip;
      if (top < 32) {
        const Words follows = bits_as<Words>((keys >> top) == prefix);
        digit = (digit & follows) | (~follows & bins);
      }
      store(digits + j, digit);
    }
    for (int64_t j = 0; j < size / 4 * 4; j += 4)
      for (int lane = 0; lane < 4; ++lane) ++counts[digits[j + lane] * 4 + lane];
    for (int64_t j = size / 4 * 4; j < size; ++j) ++counts[digits[j] * 4];
  }
}

// Calls each(word of the keys above `last`, word of those that equal it, which word) for a row.
template <class Each>
PEFT_KERNELS_INLINE void compare_row(const float* data, int64_t columns, int32_t last, Each each) {
  const auto compare = [&](const float* some, uint32_t valid, int64_t word) {
    Words above{}, equal{};
    unrolled<kWordVectors>([&](auto v) {
      const Ints keys = keys_of(some + v * kFloats);
      above |= bits_as<Words>(keys > last) & flags<Words, v * kFloats>();
      equal |= bits_as<Words>(keys == last) & flags<Words, v * kFloats>();
    });
    each(any_lane(above) & valid, last > kNanKey ? any_lane(equal) & valid : 0, word);
  };
  int64_t i = 0;
  for (; i + kWordBits <= columns; i += kWordBits) compare(data + i, ~0u, i / kWordBits);
  if (i == columns) return;
  float rest[kWordBits] = {};
  std::memcpy(rest, data + i, (columns - i) * sizeof(float));
  compare(rest, (1u << (columns - i)) - 1, i / kWordBits);
}

inline int64_t select_ties(const float* data, int64_t columns, int32_t last) {
  int64_t ties = 0;
  compare_row(data, columns, last, [&](uint32_t, uint32_t equal, int64_t) { ties += __builtin_popcount(equal); });
  return ties;
}

inline void select_keep_row(const float* data, int64_t columns, int32_t last, int64_t wanted, uint32_t* words) {
  compare_row(data, columns, last, [&](uint32_t above, uint32_t equal, int64_t word) {
    int64_t ties = __builtin_popcount(equal);
    for (; ties > wanted; --ties) equal &= ~(0x80000000u >> __builtin_clz(equal));  // the last ones go
    wanted -= ties;
    words[word] = above | equal;
  });
}
