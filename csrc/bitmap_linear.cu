// y = x W^T + b for at most 8 rows of x, W pruned and kept as bits and nonzeros: each byte of it is read once, by
// asynchronous copies to shared memory (values) and 16 bytes a lane (bits), and multiplied by the tensor cores.
//
// Floor, 4096 x 4096 in 16 bits at 50, 30, 10 % density: 20.0, 13.3, 6.2 MB, 4.7, 3.1, 1.4 us at 4.3 TB/s (dense 7.8).
// A warp takes 3.7 instructions a weight to decode and multiply, 5.7 with all that surrounds it: 2.0 and 3.1 us of
// issue on 132 multiprocessors at 1.83 GHz, so that below 30 % density it is not memory that bounds it. Never run on
// a GPU.
//
// How the work is divided: bitmap.h. What a lane has and where: bitmap_decode.cuh.
#include <cooperative_groups.h>

#include "bitmap_decode.cuh"
#include "bitmap_linear.h"
#include "cuda_element.cuh"
#include "mma.cuh"

namespace peft_kernels {
namespace {

namespace cg = cooperative_groups;

struct Arguments {
  BitmapWeight w;
  BitmapPlan plan;
  const void* x;
  int64_t x_stride;
  const void* bias;
  void* y;
  int m;
};

// What blocks have beside the dynamic shared memory.
struct Common {
  uint64_t arrived[kBitmapWarps][kBitmapRanges];  // barriers, of a group's ranges
  uint32_t counts[kBitmapWarps][32];
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One thread copies from sm_90 on; before, all threads of a group.
__device__ __forceinline__ void prepare_barrier(uint64_t& barrier, int threads) {
#if __CUDA_ARCH__ >= 900
  threads = 1;
#endif
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(&barrier)), "r"(threads) : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for(uint64_t& barrier, int parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
                 "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
                 "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(shared_address(&barrier)), "r"(parity) : "memory");
  } while (done == 0);
}

// Volatile, so that it stays above the barriers.
__device__ __forceinline__ uint4 load_words(const void* from) {
  uint4 words;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "l"(from) : "memory");
  return words;
}
__device__ __forceinline__ uint4 load_words_once(const void* from) {
  uint4 words;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "l"(from) : "memory");
  return words;
}

// A group asks for a panel's slots, range after range.
__device__ __forceinline__ void copy_values(const Arguments& a, const BitmapShare& share, int lane, int first,
                                            int slots, uint32_t target, uint64_t (&arrived)[kBitmapRanges]) {
  const char* source = static_cast<const char*>(a.w.values) + static_cast<int64_t>(first) * kSlotBytes;
#if __CUDA_ARCH__ >= 900
  if (share.warp != 0 || lane != 0) return;
#pragma unroll 1
  for (int r = 0; r < kBitmapRanges; ++r) {
    const BitmapRange range = range_of(slots, r);
    const uint32_t barrier = shared_address(&arrived[r]), bytes = range.end - range.begin;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
    if (bytes == 0) continue;
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(target + range.begin), "l"(source + range.begin), "r"(bytes), "r"(barrier) : "memory");
  }
#else
  const auto copy = [&](int at) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(target + at), "l"(source + at) : "memory");
  };
  const auto arrive = [&](int range) {  // this thread has arrived once its copies so far have
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(shared_address(&arrived[range])) : "memory");
  };
  copy_panel(slots, 32 * a.plan.width, 32 * share.warp + lane, copy, arrive);
#endif
}

// The 8 tokens' numbers of x at a lane's columns of a chunk, 0 past the last token and the last column.
template <class T>
__device__ __forceinline__ void load_x(const Arguments& a, int lane, int chunk, uint4 (&x)[8]) {
  const int token = lane_token(lane), column = chunk * kBitmapColumns + bitmap_x_column(lane, 0);
  const T* const source = static_cast<const T*>(a.x) + token * a.x_stride + column;
  const int left = token < a.m ? static_cast<int>(a.w.k) - column : 0;
#pragma unroll
  for (int q = 0; q < 8; ++q) {
    x[q] = make_uint4(0, 0, 0, 0);
    if (bitmap_x_column(0, q) < left) x[q] = load_words(source + bitmap_x_column(0, q));
  }
}

// A lane's bits of a chunk, or none.
__device__ __forceinline__ LaneBits load_bits(const Arguments& a, const BitmapShare& share, int lane, int chunk,
                                              bool lives) {
  if (!lives) return {};
  const int64_t at = static_cast<int64_t>(share.strip) * a.plan.chunks + chunk;
  const uint4 words = load_words_once(static_cast<const char*>(a.w.bits) + at * kBitmapChunkBytes + 16 * lane);
  return {words.x, words.y, words.z, words.w};
}

// A warp's product with a chunk.
template <class T>
__device__ __forceinline__ void multiply_chunk(const uint4 (&x)[8], const LaneBits& bits, Streams& streams,
                                               float (&sums)[4]) {
  const auto load = [](uint32_t address) {  // volatile: it stays behind the waits
    uint16_t value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
    return static_cast<uint32_t>(value);
  };
#pragma unroll
  for (int tile = 0; tile < 16; ++tile) {
    uint32_t operand[4];
    decode_tile(bits.words[tile / 4] >> (8 * (tile % 4)), streams, load, operand);
    const uint4& b = x[tile / 2];
    multiply(sums, operand, tile % 2 == 0 ? b.x : b.z, tile % 2 == 0 ? b.y : b.w, T{});
  }
}

// y of the rows of a block's strips.
template <class T>
__device__ __forceinline__ void store(const Arguments& a, const BitmapSum& which, int strip, float value) {
  if (strip >= a.plan.strips) return;
  const int row = a.w.order[strip * kBitmapRows + which.row];
  if (row >= a.w.n) return;
  if (a.bias != nullptr) value += to_float(static_cast<const T*>(a.bias)[row]);
  from_float(value, static_cast<T*>(a.y)[which.token * a.w.n + row]);
}

// Blocks on a multiprocessor, for which the compiler is to leave registers: it spills on sm_100 where three are to fit.
#if __CUDA_ARCH__ >= 1000
constexpr int kResident = 2;
#else
constexpr int kResident = 3;
#endif

template <class T>
__global__ void __launch_bounds__(32 * kBitmapWarps, kResident)
bitmap_linear_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Common common;
  // Of lane 0, so that the compiler knows them to be the same in all lanes.
  const auto uniform = [](unsigned int value) { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(value), 0); };
  const int lane = static_cast<int>(threadIdx.x), tile = static_cast<int>(blockIdx.x);
  const BitmapShare share(a.plan, tile, static_cast<int>(blockIdx.y), uniform(threadIdx.z), uniform(threadIdx.y));
  const bool strip_lives = share.strip < a.plan.strips;
  uint64_t(&arrived)[kBitmapRanges] = common.arrived[share.group];
  if (share.warp == 0 && lane < kBitmapRanges) prepare_barrier(arrived[lane], 32 * a.plan.width);
  __syncthreads();

  const uint32_t values = shared_address(shared) + share.group * a.plan.group_bytes;
  float sums[4] = {};
  int parity = 0;
  for (int panel = share.first_panel; panel < a.plan.panels; panel += a.plan.splits, parity ^= 1) {
    if (panel != share.first_panel) __syncthreads();  // the values and counts of the panel before are used
    int first = 0, slots = 0;
    if (strip_lives) {
      const int32_t* start = a.w.starts + static_cast<int64_t>(share.strip) * a.plan.panels + panel;
      first = start[0];
      slots = start[1] - first;
    }
    const int chunk = share.chunk(a.plan, panel), turns = share.turns(a.plan, panel);
    LaneBits bits = load_bits(a, share, lane, chunk, turns > 0);
    const uint32_t others = stream_counts(load_bits(a, share, lane, chunk + 1, turns > 1));
    copy_values(a, share, lane, first, slots, values, arrived);
    uint4 x[8];
    load_x<T>(a, lane, chunk, x);
    common.counts[share.warp_of_block][lane] = others + stream_counts(bits);
    __syncthreads();
    uint32_t end = counts_before(common.counts, share.warp_of_block - share.warp, share.warp_of_block, lane);
    Streams streams(values, lane, end);
    int waited = 0;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      if (turn > 0) {  // the bits once more, from the L2 cache: there are no registers to keep them
        bits = load_bits(a, share, lane, chunk + 1, true);
        load_x<T>(a, lane, chunk + 1, x);
      }
      end += stream_counts(bits);
      const int last = static_cast<int>(__reduce_max_sync(0xFFFFFFFFu, last_slot(end)));
      for (; waited < kBitmapRanges && needs_range(last, slots, waited); ++waited) wait_for(arrived[waited], parity);
      multiply_chunk<T>(x, bits, streams, sums);
    }
    // Also of ranges that it does not need: none may be under way when its barrier's next turn begins.
    for (; waited < kBitmapRanges; ++waited) wait_for(arrived[waited], parity);
  }

  float* const warp_sums = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i)
    warp_sums[bitmap_sum_offset(share.warp_of_block, result_token(lane, i), result_row(lane, i))] = sums[i];
  __syncthreads();
  const int count = kBitmapRows * a.plan.groups * a.m, thread = 32 * share.warp_of_block + lane;
#if __CUDA_ARCH__ >= 900
  if (a.plan.splits > 1) {
    const cg::cluster_group cluster = cg::this_cluster();
    cluster.sync();
    const int first = static_cast<int>(blockIdx.y) * a.plan.threads + thread;
    for (int i = first; i < count; i += a.plan.splits * a.plan.threads) {
      const BitmapSum which(a.plan, i);
      float sum = 0.0f;
      for (int split = 0; split < a.plan.splits; ++split)
        sum += which.over_warps(a.plan, cluster.map_shared_rank(warp_sums, split));
      store<T>(a, which, tile * a.plan.groups + which.group, sum);
    }
    cluster.sync();  // no block ends while its sums are read
    return;
  }
#endif
  for (int i = thread; i < count; i += a.plan.threads) {
    const BitmapSum which(a.plan, i);
    store<T>(a, which, tile * a.plan.groups + which.group, which.over_warps(a.plan, warp_sums));
  }
}

}  // namespace

int bitmap_gpu(int device, BitmapGpu& gpu) {
  int major = 0, clusters = 0;
  const auto ask = [&](cudaDeviceAttr name, int& value) { return cudaDeviceGetAttribute(&value, name, device); };
  cudaError_t error = ask(cudaDevAttrMultiProcessorCount, gpu.multiprocessors);
  if (error == cudaSuccess) error = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.shared_bytes);
  if (error == cudaSuccess) error = ask(cudaDevAttrComputeCapabilityMajor, major);
  if (error == cudaSuccess) error = ask(cudaDevAttrClusterLaunch, clusters);
  if (error != cudaSuccess) cudaGetLastError();
  gpu.shared_bytes -= static_cast<int>(sizeof(Common));
  gpu.clusters = major >= 9 && clusters != 0;
  return error;
}

int launch_bitmap_linear(Launch launch, const BitmapWeight& weight, int dtype, const BitmapLinear& call,
                         const BitmapPlan& plan) {
  if (call.m < 1 || call.m > kBitmapTokens || !bitmap_fits(weight)) return cudaErrorInvalidValue;
  if (dtype != kBFloat16 && dtype != kFloat16) return cudaErrorInvalidValue;
  if (const cudaError_t error = use_device(launch.device)) return error;
  const auto kernel = dtype == kBFloat16 ? bitmap_linear_kernel<__nv_bfloat16> : bitmap_linear_kernel<__half>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned int>(plan.tiles), static_cast<unsigned int>(plan.splits));
    config.blockDim = dim3(32, static_cast<unsigned int>(plan.width), static_cast<unsigned int>(plan.groups));
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.stream = static_cast<cudaStream_t>(launch.stream);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1, static_cast<unsigned int>(plan.splits), 1};
    config.attrs = &cluster;
    config.numAttrs = plan.splits > 1 ? 1 : 0;
    const Arguments arguments{weight, plan, call.x, call.x_stride, call.bias, call.y, call.m};
    error = cudaLaunchKernelEx(&config, kernel, arguments);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace peft_kernels
