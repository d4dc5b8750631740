// Numbers on the device, and the same on the host that tests what the device computes.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "numeric.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace peft_kernels {

template <class T>
PEFT_KERNELS_HOST_DEVICE T least(T a, T b) {
  return a < b ? a : b;
}

template <class T>
PEFT_KERNELS_HOST_DEVICE T greatest(T a, T b) {
  return a > b ? a : b;
}

PEFT_KERNELS_HOST_DEVICE float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return float_from_bits(bits);
#endif
}

// Two numbers rounded to `dtype` (kBFloat16 or kFloat16), the first in the low half.
template <int dtype>
PEFT_KERNELS_HOST_DEVICE uint32_t pack(float first, float second) {
  static_assert(dtype == kBFloat16 || dtype == kFloat16, "a 16-bit type");
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  if constexpr (dtype == kBFloat16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#else
  const auto narrow = dtype == kBFloat16 ? bfloat16_from_float : float16_from_float;
  return static_cast<uint32_t>(narrow(second)) << 16 | narrow(first);
#endif
}

// The number in the low half of a word.
template <int dtype>
PEFT_KERNELS_HOST_DEVICE float low_half(uint32_t word) {
  static_assert(dtype == kBFloat16 || dtype == kFloat16, "a 16-bit type");
  if constexpr (dtype == kBFloat16) return bits_to_float(word << 16);
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
#else
  return float_from_float16(static_cast<uint16_t>(word));
#endif
}

template <int dtype>
PEFT_KERNELS_HOST_DEVICE float high_half(uint32_t word) {
  if constexpr (dtype == kBFloat16) return bits_to_float(word & 0xFFFF0000u);
  else return low_half<dtype>(word >> 16);
}

}  // namespace peft_kernels
