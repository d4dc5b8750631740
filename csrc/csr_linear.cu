// y = x W^T + b for at most 8 rows of x, W pruned and kept as numbers and their columns: a thread takes 8 of each by
// two loads of 16 bytes and gathers x from shared memory, where a column of all rows is one load.
//
// Floor, 4096 x 4096 in 16 bits at 10, 5 % density: 6.8, 3.5 MB, 1.6, 0.8 us at 4.3 TB/s (dense 7.8). Instructions are
// paid for kept weights alone, so that memory bounds it with one row of x; with 8 the gathers' bank conflicts do. Never
// run on a GPU.
//
// Where a row begins is a read that its numbers' addresses wait for. So that memory does not wait too, each block first
// asks the L2 cache for what its rows would be if all were equally long. All rows of a 4096 x 4096 weight are under way
// at once.
//
// How the work is divided: csr_plan.h. What a thread does: csr_row.cuh.
#include "csr_linear_cuda.h"
#include "csr_row.cuh"
#include "cuda_element.cuh"

namespace peft_kernels {
namespace {

struct Arguments {
  CsrWeight w;
  CsrPlan plan;
  CsrLinear call;
};

__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "l"(from));
  return words;
}

__device__ __forceinline__ CsrGroup load_group(const CsrWeight& w, int64_t group) {
  const uint4 v = load_once(static_cast<const char*>(w.values) + 16 * group);
  const uint4 c = load_once(static_cast<const char*>(w.columns) + 16 * group);
  return {{v.x, v.y, v.z, v.w}, {c.x, c.y, c.z, c.w}};
}

// Bytes [begin, end) of a tensor to the L2 cache: by one thread from sm_90 on, before by all of a block.
__device__ __forceinline__ void ask_for(const void* tensor, int64_t begin, int64_t end) {
  const char* const source = static_cast<const char*>(tensor);
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x != 0 || begin == end) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
               :: "l"(source + begin), "r"(static_cast<uint32_t>(end - begin)) : "memory");
#else
  constexpr int line = 128;
  for (int64_t at = begin + line * static_cast<int>(threadIdx.x); at < end; at += line * static_cast<int>(blockDim.x))
    asm volatile("prefetch.global.L2 [%0];" :: "l"(source + at) : "memory");
#endif
}

// Where a row of W lies; rows past the last are empty.
__device__ __forceinline__ int2 bounds(const CsrWeight& w, int64_t row) {
  if (row >= w.n) return make_int2(0, 0);
  return make_int2(__ldg(w.starts + row), __ldg(w.starts + row + 1));
}

// Rows [first, first + rows) of x to shared memory, columns side by side, zeros past the last row and the last column.
template <int dtype, int rows>
__device__ __forceinline__ void stage(const Arguments& a, int first, CsrColumn<rows>* columns) {
  const int slots = csr_slots(a.w.k), width = static_cast<int>((a.w.k + 7) / 8 * 8);
  const uint16_t* const x = static_cast<const uint16_t*>(a.call.x) + first * a.call.x_stride;
  for (int column = 2 * static_cast<int>(threadIdx.x); column < slots; column += 2 * static_cast<int>(blockDim.x)) {
    uint32_t pairs[rows];
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      pairs[row] = 0;
      if (first + row < a.call.m && column < width)
        pairs[row] = *reinterpret_cast<const uint32_t*>(x + row * a.call.x_stride + column);
    }
    csr_columns<dtype, rows>(pairs, columns[column], columns[column + 1]);
  }
}

template <int count>
__device__ __forceinline__ void fold(float* sums, int lane, int& offset) {
  if constexpr (count > 1) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, csr_sent<count>(sums, i, upper), offset);
      sums[i] = csr_kept<count>(sums, i, upper) + other;
    }
    offset /= 2;
    fold<count / 2>(sums, lane, offset);
  }
}

template <class T>
__device__ __forceinline__ void store(const Arguments& a, int row_of_x, int64_t row, float value) {
  if (row >= a.w.n || row_of_x >= a.call.m) return;
  if (a.call.bias != nullptr) value += to_float(static_cast<const T*>(a.call.bias)[row]);
  from_float(value, static_cast<T*>(a.call.y)[row_of_x * a.w.n + row]);
}

template <class T, int dtype, int rows>
__global__ void __launch_bounds__(32 * kCsrWarps, 1) csr_linear_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) char shared[];
  auto* const columns = reinterpret_cast<CsrColumn<rows>*>(shared);
  auto* const warp_sums = reinterpret_cast<float*>(shared + csr_sums_offset(a.w.k, rows));
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const CsrShare share(a.plan, thread);
  const int64_t tile_step = int64_t{a.plan.blocks} * a.plan.rows, first_row = int64_t{block} * a.plan.rows + share.row;
  const int2 first = bounds(a.w, first_row);
  const CsrAhead ahead(a.plan, a.w.n, a.call.groups, block);
  ask_for(a.w.values, 16 * ahead.begin, 16 * ahead.end);
  ask_for(a.w.columns, 16 * ahead.begin, 16 * ahead.end);

  const auto fetch = [&](int64_t group) { return load_group(a.w, group); };
  const auto load = [&](uint32_t column) { return columns[column]; };
  for (int first_x = 0; first_x < a.call.m; first_x += rows) {
    CsrRun run;
    run.begin(first.x, first.y, share.lane, share.stride, fetch);
    if (first_x > 0) __syncthreads();  // x before is used
    stage<dtype, rows>(a, first_x, columns);
    __syncthreads();
    int64_t row = first_row;
    for (int tile = block; tile < a.plan.tiles; tile += a.plan.blocks, row += tile_step) {
      const int2 next = bounds(a.w, tile + a.plan.blocks < a.plan.tiles ? row + tile_step : a.w.n);
      float sums[rows] = {};
      run.multiply<dtype, rows>(fetch, load, sums);
      run.begin(next.x, next.y, share.lane, share.stride, fetch);
      int offset = a.plan.lanes / 2;
      fold<rows>(sums, thread, offset);
      for (; offset > 0; offset /= 2) sums[0] += __shfl_xor_sync(0xFFFFFFFFu, sums[0], offset);
      const int lane = share.lane & (a.plan.lanes - 1), of_x = csr_row_left(lane, a.plan.lanes, rows);
      const bool stores = csr_stores(lane, a.plan.lanes, rows);
      if (a.plan.parts == 1) {
        if (stores) store<T>(a, first_x + of_x, row, sums[0]);
        continue;
      }
      if (stores) warp_sums[thread / 32 * rows + of_x] = sums[0];
      __syncthreads();
      for (int i = thread; i < a.plan.rows * rows; i += static_cast<int>(blockDim.x)) {
        const float* const of_row = warp_sums + i / rows * a.plan.parts * rows + i % rows;
        float sum = 0.0f;
        for (int part = 0; part < a.plan.parts; ++part) sum += of_row[part * rows];
        store<T>(a, first_x + i % rows, row - share.row + i / rows, sum);
      }
      __syncthreads();
    }
  }
}

template <class T, int dtype>
int launch_rows(Launch launch, const Arguments& arguments) {
  const auto start = [&](auto kernel) {
    const int bytes = csr_shared_bytes(arguments.plan, arguments.w.k, arguments.call.rows);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
      kernel<<<static_cast<unsigned int>(arguments.plan.blocks), static_cast<unsigned int>(32 * arguments.plan.warps),
               static_cast<size_t>(bytes), static_cast<cudaStream_t>(launch.stream)>>>(arguments);
      error = cudaGetLastError();
    }
    if (error != cudaSuccess) cudaGetLastError();
    return static_cast<int>(error);
  };
  switch (arguments.call.rows) {
    case 1: return start(csr_linear_kernel<T, dtype, 1>);
    case 2: return start(csr_linear_kernel<T, dtype, 2>);
    case 4: return start(csr_linear_kernel<T, dtype, 4>);
    case 8: return start(csr_linear_kernel<T, dtype, 8>);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

int csr_gpu(int device, CsrGpu& gpu) {
  cudaError_t error = cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

int launch_csr_linear(Launch launch, const CsrWeight& weight, const CsrLinear& call, const CsrPlan& plan) {
  if (call.m < 1 || call.m > kCsrRows || weight.k > kCsrMostNarrow) return cudaErrorInvalidValue;
  if (const cudaError_t error = use_device(launch.device)) return error;
  const Arguments arguments{weight, plan, call};
  if (weight.dtype == kBFloat16) return launch_rows<__nv_bfloat16, kBFloat16>(launch, arguments);
  if (weight.dtype == kFloat16) return launch_rows<__half, kFloat16>(launch, arguments);
  return cudaErrorInvalidValue;
}

}  // namespace peft_kernels
