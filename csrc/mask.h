// Masks of one bit an element on the host. The format: peft_kernels/formats/mask.py.
#pragma once

#include <cstdint>

namespace peft_kernels {

constexpr int kByte = -1;  // beside DType: bool and integers of 8 bits

// Bit k % 32 of word [n, k / 32]; null where everything is kept.
struct MaskWords {
  const uint32_t* data;
  int64_t row_stride;

  const uint32_t* at(int64_t row, int64_t column) const { return data + row * row_stride + column / 32; }
};

}  // namespace peft_kernels
