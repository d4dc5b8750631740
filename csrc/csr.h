// A pruned weight as its kept numbers and their columns: peft_kernels/formats/csr.py says what is where.
#pragma once

#include <cstdint>

namespace peft_kernels {

constexpr int kCsrGroup = 8;               // kept numbers of a group
constexpr int64_t kCsrMostNarrow = 65535;  // columns of weights up to this wide take 16 bits

struct CsrWeight {
  int64_t n, k;
  int dtype;
  const void* values;     // [groups, 8]
  const void* columns;    // uint16 or, of wider weights, int32 [groups, 8]; k where a number pads
  const int32_t* starts;  // [n + 1], in groups
};

}  // namespace peft_kernels
