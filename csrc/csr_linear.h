// What csrc/csr_linear.cpp offers, as cpu_kernels.h declares the other CPU kernels.
#pragma once

#include "cpu_kernels.h"
#include "csr.h"

namespace peft_kernels {

// y [M, N] = x Wᵀ + bias (or none); grad_x [M, K] = grad_y W. All in the dtype of W, sums in float.
void csr_linear_forward(int64_t m, const CsrWeight& w, Matrix x, Matrix bias, Matrix y, int threads);
void csr_linear_backward(int64_t m, const CsrWeight& w, Matrix grad_y, Matrix grad_x, int threads);

}  // namespace peft_kernels
