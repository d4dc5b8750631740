// What the CPU extension offers: plain C++ over raw pointers, no torch. Strides and sizes count elements.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Dropout's parameters: `seed` points to the 64-bit seed, or is null for no dropout. See philox.h.
struct Dropout {
  const int64_t* seed;
  uint32_t threshold;
  double scale;
};

// A matrix whose columns are adjacent in memory.
struct Matrix {
  void* data;
  int64_t row_stride;
  int dtype;
};

// out [rows, columns], contiguous = drop(x); x's row m has the counters of row m + row_offset.
void philox_dropout(Matrix x, void* out, int64_t rows, int64_t columns, int64_t row_offset, Dropout dropout,
                    int threads);

// The low-rank half of lora_linear over M rows: A [r, K] and B [N, r] in one dtype, everything else in x's dtype.
struct LoraSizes {
  int64_t m, n, k, r;
};

// s [M, r] = drop(x) Aᵀ, y [M, N] += scaling s Bᵀ, in one pass over x and one over y.
void lora_forward(LoraSizes sizes, Matrix x, Matrix y, Matrix s, Matrix lora_A, Matrix lora_B, double scaling,
                  Dropout dropout, int threads);

// With dS = scaling dY B: grad_x += drop(dS A), grad_A = dSᵀ drop(x), grad_B = scaling dYᵀ s, in one pass over each of
// dY, x and grad_x. A gradient whose data is null is not computed (nor is its input read). grad_A and grad_B are contiguous.
void lora_backward(LoraSizes sizes, Matrix grad_y, Matrix x, Matrix s, Matrix lora_A, Matrix lora_B, double scaling,
                   Dropout dropout, Matrix grad_x, Matrix grad_A, Matrix grad_B, int threads);

}  // namespace peft_kernels
