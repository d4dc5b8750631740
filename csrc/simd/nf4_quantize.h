// Blocks to NF4; included by each.h once per vector width.

#include "../nf4.h"
#include "tile.h"

// The index of the nearest of the 16 numbers, the lower one on a midpoint: how many midpoints are less.
PEFT_KERNELS_INLINE Ints nearest(Floats value) {
  Ints index{};
  unrolled<15>([&](auto i) { index -= value > splat(nf4_midpoint(i)); });
  return index;
}

PEFT_KERNELS_INLINE float largest_magnitude(const float* values, int64_t count) {
  Words largest{};
  for (int64_t i = 0; i < count; i += kFloats) {
    // As integers magnitudes order as they do as floats, with NaN beyond all.
    const Words magnitude = load<Words>(values + i) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  uint32_t all = 0;
  for (int lane = 0; lane < kFloats; ++lane) all = std::max<uint32_t>(all, largest[lane]);
  return float_from_bits(all);
}

// `count` values, followed by zeros up to whole vectors, as indices, two a byte; `packed` has room for whole vectors.
// bitsandbytes multiplies by the reciprocal in whole blocks and divides in a short one; so that its bytes come out, so
// does this.
PEFT_KERNELS_INLINE void quantize_block(const float* values, int64_t count, bool whole, float scale, uint8_t* packed) {
  typedef uint8_t Pairs __attribute__((vector_size(kCounters)));
  const Floats divisor = splat(scale), factor = splat(1.0f / scale);
  for (int64_t i = 0; i < count; i += kFloats) {
    const Floats value = load<Floats>(values + i);
    // The first index of a pair is in the low half of 64 bits, and goes to the high half of the byte.
    const Longs pairs = bits_as<Longs>(nearest(whole ? value * factor : value / divisor));
    store(packed + i / 2, __builtin_convertvector((pairs << 4) | (pairs >> 32), Pairs));
  }
}

// Elements [begin, end) of a flattened weight, from the beginning of a block on.
inline void nf4_quantize_run(int dtype, const void* source, int64_t begin, int64_t end, int64_t blocksize,
                             uint8_t* packed, float* absmax) {
  alignas(64) float values[kNf4MaxBlock];
  alignas(64) uint8_t bytes[kNf4MaxBlock / 2];
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* elements = static_cast<const typename Type::Storage*>(source);
    for (int64_t first = begin; first < end; first += blocksize) {
      const int64_t count = std::min(blocksize, end - first);
      load_row<Type, kFloats>(elements + first, count, nullptr, 1.0f, values);
      const float scale = largest_magnitude(values, count);
      const float divisor = scale < kNf4LeastScale ? kNf4LeastScale : scale;  // NaN stays
      const bool whole = count == blocksize;
      absmax[first / blocksize] = whole ? scale : divisor;
      const bool in_place = count % kFloats == 0;
      quantize_block(values, count, whole, divisor, in_place ? packed + first / 2 : bytes);
      if (!in_place) std::memcpy(packed + first / 2, bytes, static_cast<size_t>((count + 1) / 2));
    }
  });
}
