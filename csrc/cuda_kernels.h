// What the CUDA extension offers: launches over raw device pointers on a given stream, no torch. Sizes and strides count
// elements, `dtype` is a DType of numeric.h. Each returns the cudaError_t of its launch as an int, 0 for success.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Where a launch goes: `stream` is a cudaStream_t of `device`.
struct Launch {
  int device;
  void* stream;
};

// out [rows, columns], contiguous = drop(x). `seed` points to the 64-bit seed on the device: the host never reads it.
int launch_philox_dropout(Launch launch, const void* x, int64_t x_stride, void* out, int64_t rows, int64_t columns,
                          int64_t row_offset, int dtype, const int64_t* seed, uint32_t threshold, float scale);

// out [numel] = scale * sum of the float32 partials [parts, numel], added in the order of the parts, rounded once.
int launch_splitk_reduce(Launch launch, const float* partials, int64_t parts, int64_t numel, float scale, void* out,
                         int dtype);

const char* cuda_error_text(int code);
int cuda_compiler_version();

}  // namespace peft_kernels
