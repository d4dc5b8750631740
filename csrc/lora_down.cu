// S = x A^T for at most 16 rows of x: what a low-rank update takes before a launch that adds it in its last stage.
//
// Floor: x and A read once, 256 KB at 16 rows, K = 4096 and r = 16, less than a launch. A block makes a column of S. On
// GPUs with programmatic dependent launch the next kernel starts beside this one, so that it costs little more than its
// launch. Never run on a GPU.
#include "cuda_element.cuh"
#include "cuda_kernels.h"

namespace peft_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWidth = 8;

template <class T>
struct LoraDownArguments {
  const T* x;
  int64_t x_stride, k;
  const T* A;
  int64_t A_stride;
  T* s;
  int m, r;
  bool vector;  // rows of x and A begin at multiples of 16 bytes, and K is a multiple of 8
};

// 8 numbers of a row from `column` on; past K they count as 0.
template <class T>
__device__ __forceinline__ void load(const T* row, int64_t column, int64_t k, bool vector, T (&values)[kWidth]) {
  if (vector) {
    *reinterpret_cast<uint4*>(values) = __ldg(reinterpret_cast<const uint4*>(row + column));
    return;
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    if (column + e < k) values[e] = row[column + e];
    else from_float(0.0f, values[e]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) lora_down_kernel(const __grid_constant__ LoraDownArguments<T> a) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  __shared__ float partials[kWarps][kMaxTokens];
  const T* factor = a.A + blockIdx.x * a.A_stride;
  float sums[kMaxTokens] = {};
  for (int64_t column = threadIdx.x * kWidth; column < a.k; column += kThreads * kWidth) {
    alignas(16) T right[kWidth];
    load(factor, column, a.k, a.vector, right);
#pragma unroll
    for (int token = 0; token < kMaxTokens; ++token) {
      if (token >= a.m) break;
      alignas(16) T left[kWidth];
      load(a.x + token * a.x_stride, column, a.k, a.vector, left);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sums[token] = fmaf(to_float(left[e]), to_float(right[e]), sums[token]);
    }
  }
#pragma unroll
  for (int token = 0; token < kMaxTokens; ++token) {
    if (token >= a.m) break;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      sums[token] += __shfl_xor_sync(0xFFFFFFFFu, sums[token], distance);
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32][token] = sums[token];
  }
  __syncthreads();
  const int token = static_cast<int>(threadIdx.x);
  if (token >= a.m) return;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += partials[warp][token];
  from_float(sum, a.s[static_cast<int64_t>(token) * a.r + blockIdx.x]);
}

template <class T>
int launch_typed(cudaStream_t stream, LoraDownArguments<T> a) {
  a.vector = a.k % kWidth == 0 && is_aligned(a.x, 16) && is_aligned(a.A, 16) &&
             (a.m == 1 || a.x_stride % kWidth == 0) && (a.r == 1 || a.A_stride % kWidth == 0);
  lora_down_kernel<T><<<static_cast<unsigned int>(a.r), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

int launch_lora_down(Launch launch, int m, int r, int64_t k, int dtype, const void* x, int64_t x_stride,
                     const void* lora_A, int64_t A_stride, void* s) {
  if (m < 1 || m > kMaxTokens || r < 1) return cudaErrorInvalidValue;
  if (const cudaError_t error = use_device(launch.device)) return error;
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto typed = [&](auto element) {
    using T = decltype(element);
    return launch_typed<T>(stream, {static_cast<const T*>(x), x_stride, k, static_cast<const T*>(lora_A), A_stride,
                                    static_cast<T*>(s), m, r, false});
  };
  if (dtype == kBFloat16) return typed(__nv_bfloat16{});
  if (dtype == kFloat16) return typed(__half{});
  return cudaErrorInvalidValue;
}

}  // namespace peft_kernels
