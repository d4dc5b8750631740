// Second stage of a split reduction: each element's partials are added in the order of the parts, so the bits are the same
// from run to run, and no atomics are needed.
//
// Floor: the partials read once; 16 parts of 16 x 4096 float32 (4 MB) at 4.3 TB/s is 1 us. Not yet measured on a GPU.
#include "cuda_element.cuh"
#include "cuda_kernels.h"

namespace peft_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kVectorNumel = 1 << 20;  // below this, four elements to a thread would leave multiprocessors idle

template <class T, int width>
struct alignas(sizeof(T) * width) Pack {
  T value[width];
};

template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    splitk_reduce_kernel(const float* partials, int64_t parts, int64_t numel, float scale, T* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * width;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * width; i < numel; i += step) {
    float sum[width] = {};
    const float* source = partials + i;
#pragma unroll 8
    for (int64_t part = 0; part < parts; ++part, source += numel) {
      const auto share = *reinterpret_cast<const Pack<float, width>*>(source);
#pragma unroll
      for (int e = 0; e < width; ++e) sum[e] += share.value[e];
    }
    Pack<T, width> result;
#pragma unroll
    for (int e = 0; e < width; ++e) from_float(sum[e] * scale, result.value[e]);
    *reinterpret_cast<Pack<T, width>*>(out + i) = result;
  }
}

}  // namespace

int launch_splitk_reduce(Launch launch, const float* partials, int64_t parts, int64_t numel, float scale, void* out,
                         int dtype) {
  if (numel == 0) return cudaSuccess;
  if (const cudaError_t error = use_device(launch.device)) return error;
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const bool vector = numel >= kVectorNumel && numel % 4 == 0 && is_aligned(partials, 16) && is_aligned(out, 16);
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    T* target = static_cast<T*>(out);
    if (vector) {
      splitk_reduce_kernel<T, 4><<<blocks_for(numel / 4, kThreads), kThreads, 0, stream>>>(partials, parts, numel, scale, target);
    } else {
      splitk_reduce_kernel<T, 1><<<blocks_for(numel, kThreads), kThreads, 0, stream>>>(partials, parts, numel, scale, target);
    }
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace peft_kernels
