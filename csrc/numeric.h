// Element types as they cross the Python boundary, and their scalar conversions on the host.
#pragma once

#include <cstdint>
#include <cstring>

namespace peft_kernels {

// The values are part of the binding: peft_kernels/_native.py maps torch dtypes to them.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int64_t element_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float float_from_bfloat16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// Round to nearest, ties to even. A NaN keeps its sign and becomes quiet: truncation alone could turn it into infinity.
inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_from_bits(sign | 0x7F800000u | ((magnitude & 0x03FFu) << 13));
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact
  return float_from_bits(sign | float_bits(subnormal));
}

// Round to nearest, ties to even, subnormals included; overflow goes to infinity, a NaN becomes quiet.
inline uint16_t float16_from_float(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7F800000u) return sign | 0x7E00u | static_cast<uint16_t>((magnitude >> 13) & 0x01FFu);
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Adding 0.5 lines the subnormal's last bit (2^-24) up with float's, so that the addition does the rounding.
    return sign | static_cast<uint16_t>(float_bits(float_from_bits(magnitude) + 0.5f) - 0x3F000000u);
  }
  return sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13);
}

}  // namespace peft_kernels
