// Philox 4x32-10 and the library's dropout layout on top of it, one call for 8 neighbouring elements of a row.
//
// For x [M, K] the element (m, k) belongs to the 64-bit counter c = m * ceil(K / 8) + k / 8; the key is the 64-bit seed,
// the counter words are (c low, c high, 0, 0). The four output words hold eight 16-bit lanes, word k % 8 / 2, low half
// first. An element is kept where its lane >= threshold. Specification: kernels/reference/philox_dropout.py.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace peft_kernels {

constexpr int kPhiloxRounds = 10;
constexpr int kPhiloxLanes = 8;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

struct PhiloxWords {
  uint32_t word[4];
};

PEFT_KERNELS_HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

PEFT_KERNELS_HOST_DEVICE PhiloxWords philox4x32(uint64_t seed, uint64_t counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = multiply_high(c0, kPhiloxMultiplier0), low0 = c0 * kPhiloxMultiplier0;
    const uint32_t high1 = multiply_high(c2, kPhiloxMultiplier1), low1 = c2 * kPhiloxMultiplier1;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The 16-bit lane of element `lane` (0..7) of a counter.
PEFT_KERNELS_HOST_DEVICE uint32_t philox_lane(const PhiloxWords& words, int lane) {
  return (words.word[lane >> 1] >> (16 * (lane & 1))) & 0xFFFFu;
}

PEFT_KERNELS_HOST_DEVICE int64_t philox_groups(int64_t columns) { return (columns + kPhiloxLanes - 1) / kPhiloxLanes; }

}  // namespace peft_kernels
