// The launch of csrc/csr_linear.cu, as cuda_kernels.h declares the others.
#pragma once

#include "csr_plan.h"
#include "cuda_kernels.h"

namespace peft_kernels {

// y [m, n] = x W^T + bias for m <= 8 rows in bfloat16 or float16 and W of the same type, at most 65,535 wide, whose
// tensors begin at multiples of 16 bytes. Rows of x begin at multiples of 4 bytes and end with zeros at a multiple of 8
// columns. bias may be null. csr_plan takes what `csr_gpu` says of the device.
struct CsrLinear {
  int64_t groups;
  int m, rows;  // rows: of x at a time
  const void* x;
  int64_t x_stride;
  const void* bias;
  void* y;
};
int launch_csr_linear(Launch launch, const CsrWeight& weight, const CsrLinear& call, const CsrPlan& plan);
int csr_gpu(int device, CsrGpu& gpu);

}  // namespace peft_kernels
