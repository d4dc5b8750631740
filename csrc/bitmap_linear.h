// The launch of csrc/bitmap_linear.cu, as cuda_kernels.h declares the others.
#pragma once

#include "bitmap.h"
#include "cuda_kernels.h"

namespace peft_kernels {

// y [m, n] = x W^T + bias for m <= 8 rows in bfloat16 or float16 and W of the same type as bits and nonzeros. Rows of
// x begin at multiples of 16 bytes and end with zeros at a multiple of 8 columns. bias may be null. bitmap_plan takes
// what `bitmap_gpu` says of the device.
struct BitmapLinear {
  int m;
  const void* x;
  int64_t x_stride;
  const void* bias;
  void* y;
};
int launch_bitmap_linear(Launch launch, const BitmapWeight& weight, int dtype, const BitmapLinear& call,
                         const BitmapPlan& plan);
int bitmap_gpu(int device, BitmapGpu& gpu);

}  // namespace peft_kernels
