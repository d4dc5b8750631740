// NF4 on the host: the 16 numbers, and a view of a weight. The format: peft_kernels/formats/nf4.py.
#pragma once

#include <cstdint>

namespace peft_kernels {

constexpr float kNf4Code[16] = {
    -1.0f,         -0.6961928009986877f,  -0.5250730514526367f,  -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f,  0.16093020141124725f,  0.24611230194568634f,  0.33791524171829224f,
    0.44070982933044434f,  0.5626170039176941f,   0.7229568362236023f,   1.0f,
};

// Between neighbours: index i is that of the values above midpoint i - 1 and up to midpoint i.
constexpr float nf4_midpoint(int i) { return (kNf4Code[i] + kNf4Code[i + 1]) / 2; }

constexpr int kNf4NestedShift = 8;  // blocks of double quantisation have 256 absmax values

// Element (i, j) is number first + i * row_stride + j of the flattened whole, whose blocks have 1 << shift elements.
struct Nf4Weight {
  int64_t n, k, row_stride, first;
  int shift;
  const uint8_t* packed;
  const void* absmax;  // float, or with double quantisation uint8_t
  const float *nested_absmax, *nested_map, *nested_offset;  // null without

  int64_t number(int64_t row, int64_t column) const { return first + row * row_stride + column; }
};

}  // namespace peft_kernels
