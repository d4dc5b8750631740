// What the CUDA extension offers: launches over raw device pointers on a given stream, no torch. Sizes and strides
// count elements, `dtype` is a DType of numeric.h. Each returns the cudaError_t of its launch as an int, 0 for success.
#pragma once

#include <cstdint>

#include "multi_lora.h"
#include "nf4.h"
#include "nf4_plan.h"

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

// y [m, n] = x W^T + bias + scaling S B^T for m <= 16 rows in bfloat16 or float16 and W in 4 bits, decoded to their
// type. Rows of x begin at multiples of 16 bytes. bias may be null; r = 0: no S and B. With r > 0 the launch before
// this one on the stream wrote S, and let this one start beside it.
struct Nf4Linear {
  int m;
  const void* x;
  int64_t x_stride;
  const void* bias;
  void* y;
  int r;
  const void* s;
  int64_t s_stride;
  const void* lora_B;
  int64_t lora_B_stride;
  float scaling;
};
int launch_nf4_linear(Launch launch, const Nf4Weight& q, int64_t packed_bytes, int dtype, const Nf4Linear& call,
                      const Nf4Plan& plan);
// How many clusters of that kernel the device runs at once: what nf4_plan takes.
int clusters_at_once(int device, ClustersAtOnce& clusters);

// S [m, r], contiguous = x A^T for m <= 16 rows in bfloat16 or float16; lets the next launch start beside it.
int launch_lora_down(Launch launch, int m, int r, int64_t k, int dtype, const void* x, int64_t x_stride,
                     const void* lora_A, int64_t A_stride, void* s);

// y_j += what the adapters of each token add to it: multi_lora.h.
int launch_multi_lora_linear(Launch launch, const MultiLora& call);

const char* cuda_error_text(int code);
int cuda_compiler_version();

}  // namespace peft_kernels
