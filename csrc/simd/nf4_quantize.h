// Blocks to NF4; included by each.h once per vector width.

#include "../nf4.h"
#include "tile.h"

constexpr float kNf4Least = 1e-38f;  // what an absmax counts as at least

// The index of the nearest of the 16 numbers, the lower one on a midpoint: 15 less the midpoints that are not below.
// For NaN that is 15, as in the specification.
PEFT_KERNELS_INLINE Ints nearest(Floats value) {
  Ints index = 15 + Ints{};
  unrolled<15>([&](auto i) { index += splat(nf4_midpoint(i)) >= value; });
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

// `count` values, followed by anything up to whole vectors, as indices, two a byte; `packed` has room for whole ones.
template <class Norm>
PEFT_KERNELS_INLINE void quantize_block(const float* values, int64_t count, uint8_t* packed, Norm norm) {
  typedef uint8_t Pairs __attribute__((vector_size(kCounters)));
  for (int64_t i = 0; i < count; i += kFloats) {
    // The first index of a pair is in the low half of 64 bits, and goes to the high half of the byte.
    const Longs pairs = bits_as<Longs>(nearest(norm(load<Floats>(values + i))));
    store(packed + i / 2, __builtin_convertvector((pairs << 4) | (pairs >> 32), Pairs));
  }
}

// A short last block. The half of a byte beyond an odd number of elements gets the index of 0.
PEFT_KERNELS_INLINE float quantize_short(const float* values, int64_t count, uint8_t* packed) {
  const float scale = std::max(largest_magnitude(values, count), kNf4Least);
  uint8_t bytes[kNf4MaxBlock / 2];
  quantize_block(values, count, bytes, [scale](Floats value) { return value / splat(scale); });
  if (count % 2) bytes[count / 2] = static_cast<uint8_t>((bytes[count / 2] & 0xF0) | 7);
  std::memcpy(packed, bytes, static_cast<size_t>((count + 1) / 2));
  return scale;
}

// Elements [begin, end) of a flattened weight, from the beginning of a block on.
inline void nf4_quantize_run(int dtype, const void* source, int64_t begin, int64_t end, int64_t blocksize,
                             uint8_t* packed, float* absmax) {
  alignas(64) float values[kNf4MaxBlock];
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* elements = static_cast<const typename Type::Storage*>(source);
    for (int64_t first = begin; first < end; first += blocksize) {
      const int64_t count = std::min(blocksize, end - first);
      load_row<Type, kFloats>(elements + first, count, nullptr, 1.0f, values);
      float& scale = absmax[first / blocksize];
      if (count < blocksize) {
        scale = quantize_short(values, count, packed + first / 2);
      } else {
        scale = largest_magnitude(values, count);
        const Floats factor = splat(1.0f / std::max(scale, kNf4Least));
        quantize_block(values, count, packed + first / 2, [factor](Floats value) { return value * factor; });
      }
    }
  });
}
