// Changes of chosen weights of a linear layer, over the rows that have them. No torch, as in cpu_kernels.h.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu_kernels.h"

namespace peft_kernels {

// Δ [n, k] is values[i] at place flat[i] = row * k + column, ascending, int32 or (`wide`) int64. It belongs to `m` rows
// of x and y: those that `rows` lists, each once, or (null) the first m.
struct RowDelta {
  const void* flat;
  bool wide;
  int64_t nnz;
  const float* values;
  const int64_t* rows;
  int64_t m;
  float* grad_values;  // [nnz], null where not wanted
};

// y [., N] += x Δᵀ, in float32.
void sparse_delta_forward(int64_t n, int64_t k, const std::vector<RowDelta>& deltas, Matrix x, Matrix y, int threads);

// grad_x [., K] += dY Δ, in float32 (null: not wanted), and grad_values = (dYᵀ x) at the places, which alone reads x.
void sparse_delta_backward(int64_t n, int64_t k, const std::vector<RowDelta>& deltas, Matrix grad_y, Matrix x,
                           Matrix grad_x, int threads);

}  // namespace peft_kernels
