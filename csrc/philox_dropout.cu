// Counter-based dropout on the GPU: one thread makes one Philox call, for 8 neighbouring elements of a row.
//
// Floor: x read once and the result written once; 8192 x 4096 in bf16 at 4.3 TB/s is 31 us. At that rate a streaming
// multiprocessor of an H200 has about 250 thread instructions for each group of 8 bf16 elements, of which ten rounds of
// Philox take about 60. Not yet measured on a GPU.
#include "cuda_element.cuh"
#include "cuda_kernels.h"
#include "philox.h"

namespace peft_kernels {
namespace {

constexpr int kThreads = 256;

template <class T>
struct DropoutArguments {
  const T* x;
  T* out;
  int64_t rows, columns, groups, x_stride, first_counter;
  const int64_t* seed;
  uint32_t threshold;
  float scale;
};

template <class T>
__device__ __forceinline__ void drop_element(T value, const PhiloxWords& words, int lane, uint32_t threshold,
                                             float scale, T& target) {
  from_float(philox_lane(words, lane) >= threshold ? to_float(value) * scale : 0.0f, target);
}

template <class T, bool vector>
__global__ void __launch_bounds__(kThreads) philox_dropout_kernel(const DropoutArguments<T> a) {
  constexpr int kVectors = sizeof(T) * kPhiloxLanes / sizeof(uint4);
  const uint64_t seed = static_cast<uint64_t>(*a.seed);
  const int64_t total = a.rows * a.groups, step = static_cast<int64_t>(gridDim.x) * kThreads;
  const bool small = total <= 0xFFFFFFFFll;  // 64-bit division costs more than Philox
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    int64_t row = 0;
    if (a.rows > 1) row = small ? static_cast<uint32_t>(i) / static_cast<uint32_t>(a.groups) : i / a.groups;
    const int64_t column = (i - row * a.groups) * kPhiloxLanes;
    const uint64_t counter = static_cast<uint64_t>(a.first_counter + i);
    const T* source = a.x + row * a.x_stride + column;
    T* target = a.out + row * a.columns + column;
    const int64_t count = a.columns - column;
    if (vector && count >= kPhiloxLanes) {
      alignas(16) T values[kPhiloxLanes];  // loaded first: Philox runs while the load is under way
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        reinterpret_cast<uint4*>(values)[v] = reinterpret_cast<const uint4*>(source)[v];
      const PhiloxWords words = philox4x32(seed, counter);
#pragma unroll
      for (int lane = 0; lane < kPhiloxLanes; ++lane)
        drop_element(values[lane], words, lane, a.threshold, a.scale, values[lane]);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) reinterpret_cast<uint4*>(target)[v] = reinterpret_cast<uint4*>(values)[v];
    } else {
      const PhiloxWords words = philox4x32(seed, counter);
#pragma unroll
      for (int lane = 0; lane < kPhiloxLanes; ++lane)
        if (lane < count) drop_element(source[lane], words, lane, a.threshold, a.scale, target[lane]);
    }
  }
}

template <class T>
int launch_typed(cudaStream_t stream, DropoutArguments<T> a) {
  if (a.x_stride == a.columns && a.columns % kPhiloxLanes == 0) {  // one long row: no division by its length
    a.groups *= a.rows;
    a.columns *= a.rows;
    a.rows = 1;
  }
  const int64_t bytes = sizeof(T);
  const bool vector = is_aligned(a.x, 16) && is_aligned(a.out, 16) &&
                      (a.rows == 1 || (a.x_stride * bytes % 16 == 0 && a.columns * bytes % 16 == 0));
  const unsigned int blocks = blocks_for(a.rows * a.groups, kThreads);
  if (vector) philox_dropout_kernel<T, true><<<blocks, kThreads, 0, stream>>>(a);
  else philox_dropout_kernel<T, false><<<blocks, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

int launch_philox_dropout(Launch launch, const void* x, int64_t x_stride, void* out, int64_t rows, int64_t columns,
                          int64_t row_offset, int dtype, const int64_t* seed, uint32_t threshold, float scale) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  if (const cudaError_t error = use_device(launch.device)) return error;
  const int64_t groups = philox_groups(columns);
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return launch_typed<T>(static_cast<cudaStream_t>(launch.stream),
                           {static_cast<const T*>(x), static_cast<T*>(out), rows, columns, groups, x_stride,
                            row_offset * groups, seed, threshold, scale});
  });
}

const char* cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
int cuda_compiler_version() { return __CUDACC_VER_MAJOR__ * 1000 + __CUDACC_VER_MINOR__ * 10; }

}  // namespace peft_kernels
