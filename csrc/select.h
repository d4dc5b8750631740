// The k largest of many numbers, digit by digit: peft_kernels/pruning/thresholds.py says how. No torch, as in
// cpu_kernels.h.
#pragma once

#include <cstdint>

namespace peft_kernels {

// counts [1 << (top - low)] += how often each value of the bits [low, top) occurs among the keys of data [count] whose
// bits above are `prefix`; with top = 32 among all, the lower keys first. At most 11 bits.
void select_count(const float* data, int64_t count, int top, int low, int32_t prefix, int64_t* counts, int threads);

// words [rows, ceil(columns / 32)] of data [rows, columns], both contiguous: the keys above `last`, and of those that
// equal it the first `wanted`. Returns how many equal it.
int64_t select_keep(const float* data, int64_t rows, int64_t columns, int32_t last, int64_t wanted, uint32_t* words,
                    int threads);

}  // namespace peft_kernels
