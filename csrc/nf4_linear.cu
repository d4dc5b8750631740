// y = x W^T + b (+ scaling S B^T) with W in 4 bits, for at most 16 rows of x: the packed weight is read once, 16 bytes
// a lane, decoded in registers and multiplied by the tensor cores as their first operand (16 rows of W by 8 rows of x).
//
// Floor: the packed weight read once: 14336 x 4096 with double quantisation is 30 MB, 7.1 us at 4.3 TB/s; 4096 x 4096
// is 2.0 us. The main loop takes 3.8 instructions and about one access of 4 bytes to shared memory or L1 a weight: 7.5
// and 8.0 us for 14336 x 4096 on 132 multiprocessors at 1.83 GHz. Never run on a GPU.
//
// How the work is divided: nf4_plan.h. Which lane has what: nf4_decode.cuh. A block walks tiles of rows; the loads of a
// unit's next step or tile are issued as soon as its words are taken, the first before the pair table is filled.
#include <cooperative_groups.h>

#include "cuda_element.cuh"
#include "cuda_kernels.h"
#include "mma.cuh"
#include "nf4_chunk.cuh"

namespace peft_kernels {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 32 * kPlanWarps;

// Bytes of shared memory: the pair table and the map of double quantisation, the warps' sums, the block's sums.
constexpr int kWarpSums = kPairTableBytes + kMapBytes;
constexpr int kWarpSumBytes = kBufferNumel * 4;
constexpr int block_sum_bytes(int tokens, const Nf4Plan& plan) {
  return plan.splits == 1 ? 0 : plan.units * kUnitRows * tokens * 4;
}
constexpr int shared_bytes(int tokens, const Nf4Plan& plan) {
  return kWarpSums + kWarpSumBytes + block_sum_bytes(tokens, plan);
}

template <class T>
constexpr int kElementType = kBFloat16;
template <>
constexpr int kElementType<__half> = kFloat16;

static_assert(shared_bytes(16, {kMaxUnits, 1, 1, 0, 0, 0, 0}) <= 99 << 10, "more than some GPUs from sm_80 on have");

struct Nf4LinearArguments {
  Nf4Weight q;
  PackedWords words;
  const void* x;
  int64_t x_stride;
  const void *bias, *s, *lora_B;
  int64_t s_stride, lora_B_stride;
  void* y;
  int m, r;
  float scaling;
  Nf4Plan plan;
};

// The 32 numbers of a row of x at a lane's columns. Rows begin at multiples of 16 bytes; past K they count as 0.
template <class T, Rows kind>
__device__ __forceinline__ void load_x(const Nf4LinearArguments& a, int token, int column, uint4 (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = make_uint4(0, 0, 0, 0);
  if (token >= a.m || column >= a.q.k) return;
  const T* source = static_cast<const T*>(a.x) + token * a.x_stride + column;
  const int left = static_cast<int>(a.q.k) - column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kind != kAnyRows || 8 * i + 8 <= left) {
      values[i] = __ldg(reinterpret_cast<const uint4*>(source + 8 * i));
    } else {
      uint32_t pairs[4] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (8 * i + e < left)
          pairs[e / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(source)[8 * i + e]) << (16 * (e % 2));
      values[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// y = value + bias + scaling S B^T, rounded once.
template <class T>
__device__ __forceinline__ void finish(const Nf4LinearArguments& a, int64_t row, int token, float value) {
  if (row >= a.q.n) return;
  if (a.bias != nullptr) value += to_float(static_cast<const T*>(a.bias)[row]);
  if (a.r > 0) {
    const T* s = static_cast<const T*>(a.s) + token * a.s_stride;
    const T* b = static_cast<const T*>(a.lora_B) + row * a.lora_B_stride;
    float sum = 0.0f;
    for (int j = 0; j < a.r; ++j) sum += to_float(s[j]) * to_float(b[j]);
    value += a.scaling * sum;
  }
  from_float(value, static_cast<T*>(a.y)[token * a.q.n + row]);
}

__constant__ const float kCodes[16] = {PEFT_KERNELS_NF4_CODES};

// Every thread of the block stores its part of the pair table and of the map; a barrier must follow.
__device__ __forceinline__ void fill_table(char* table, float* map, const Nf4Weight& q) {
  const int threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < kPairTableBytes / 16; i += threads) {
    const float first = kCodes[i / 256], second = kCodes[i / 16 % 16];
    reinterpret_cast<float4*>(table)[i] = make_float4(first, second, first, second);
  }
  if (q.nested_map == nullptr) return;
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += threads) map[i] = q.nested_map[i];
}

// Adds the sums of the warps of each group, and hands them to `finish` or, of a split, to the block's sums.
template <class T, int fragments>
__device__ __forceinline__ void add_warps(const Nf4LinearArguments& a, int tile, int warp, int lane,
                                          const Share& share, const float (&sums)[kGroupUnits][fragments][4],
                                          float* warp_sums, float* block_sums) {
  constexpr int kTokens = 8 * fragments, kUnitsAtOnce = kTokensAtOnce / kTokens;
  const int rows = a.plan.units * kUnitRows, groups = a.plan.groups;
#pragma unroll
  for (int unit = 0; unit < kGroupUnits; unit += kUnitsAtOnce) {
    if (unit * groups >= a.plan.units) break;
#pragma unroll
    for (int u = 0; u < kUnitsAtOnce; ++u)
#pragma unroll
      for (int f = 0; f < fragments; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          warp_sums[buffer_offset(warp, u, 8 * f + result_token(lane, i), result_row(lane, i), kTokens)] =
              sums[unit + u][f][i];
    __syncthreads();
    const int count = sums_in_round(a.plan, kTokens, a.m);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const Sum which = sum_of(a.plan, unit, kTokens, i);
      if (which.row >= rows) continue;
      float sum = 0.0f;
      for (int slot = 0; slot < share.slots; ++slot)
        sum += warp_sums[which.source + buffer_offset(slot * groups, 0, 0, 0, kTokens)];
      if (a.plan.splits == 1) finish<T>(a, tile * rows + which.row, which.token, sum);
      else block_sums[which.token * rows + which.row] = sum;
    }
    __syncthreads();
  }
}

// Adds the sums of the blocks of a cluster, each block for its part of the tile.
template <class T>
__device__ __forceinline__ void add_blocks(const Nf4LinearArguments& a, int tile, float* block_sums) {
#if __CUDA_ARCH__ >= 900
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  const int rows = a.plan.units * kUnitRows, splits = a.plan.splits;
  const int first = static_cast<int>(cluster.block_rank() * kThreads + threadIdx.x);
  for (int i = first; i < rows * a.m; i += splits * kThreads) {
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split) sum += cluster.map_shared_rank(block_sums, split)[i];
    finish<T>(a, tile * rows + i % rows, i / rows, sum);
  }
  cluster.sync();  // before another tile's sums come, and before a block whose sums are still read ends
#endif
}

// Waits until the launch before this one has ended and what it wrote (S) is seen.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class T, int fragments, Rows kind>
__global__ void __launch_bounds__(kThreads, 1) nf4_linear_kernel(const __grid_constant__ Nf4LinearArguments a) {
  extern __shared__ __align__(256) char shared[];
  char* const table = shared;
  float* const map = reinterpret_cast<float*>(shared + kPairTableBytes);
  float* const warp_sums = reinterpret_cast<float*>(shared + kWarpSums);
  float* const block_sums = reinterpret_cast<float*>(shared + kWarpSums + kWarpSumBytes);
  // Of lane 0, so that the compiler knows it to be the same in all lanes.
  const int warp = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Share share(a.plan, static_cast<int>(blockIdx.x), warp);
  Position ahead = share.begin(a.plan, static_cast<int>(blockIdx.x));

  PackedWords packed = a.words;
  if (kind == kAnyRows) packed.read_last_word();
  Chunk<kind> chunks[kGroupUnits];
  const auto origin = [&] {
    const int row = ahead.tile * a.plan.units * kUnitRows + unit_row(a.plan, share.group, 0) + lane_row(lane);
    return Origin<kind>(a.q, packed, row, ahead.step * kStepColumns + lane_column(lane));
  };
  {
    const Origin<kind> from = origin();
#pragma unroll
    for (int u = 0; u < kGroupUnits; ++u) chunks[u].load(a.q, packed, from, unit_row(a.plan, 0, u));
  }
  fill_table(table, map, a.q);
  __syncthreads();
  const float offset = a.q.nested_offset == nullptr ? 0.0f : *a.q.nested_offset;
  bool waits = a.r > 0;

  for (int tile = static_cast<int>(blockIdx.x) / a.plan.splits; tile < a.plan.tiles; tile += share.tile_step) {
    float sums[kGroupUnits][fragments][4] = {};
    while (ahead.tile == tile) {
      const int column = ahead.step * kStepColumns + lane_column(lane);
      const bool live = column < a.q.k;
      uint4 x[fragments][4];
#pragma unroll
      for (int f = 0; f < fragments; ++f) load_x<T, kind>(a, 8 * f + lane_token(lane), column, x[f]);
      share.advance(ahead);
      const Origin<kind> from = origin();  // past the last tile the last row is read once more, rather than a branch
#pragma unroll
      for (int u = 0; u < kGroupUnits; ++u) {
        if (u >= share.units) break;
        const DecodedRows<kElementType<T>, kind> rows(chunks[u], a.q, map, offset, live, by_planes(u));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t upper[4], lower[4];
          rows.decode(table, lane, i, upper, lower);
#pragma unroll
          for (int product = 0; product < 2; ++product) {
            uint32_t operand[4];
            first_operand(upper, lower, product, operand);
#pragma unroll
            for (int f = 0; f < fragments; ++f) {
              const uint4& b = x[f][i];
              multiply(sums[u][f], operand, product == 0 ? b.x : b.z, product == 0 ? b.y : b.w, T{});
            }
          }
        }
        chunks[u].load(a.q, packed, from, unit_row(a.plan, 0, u));
      }
    }
    if (waits) wait_for_predecessor();
    waits = false;
    add_warps<T, fragments>(a, tile, warp, lane, share, sums, warp_sums, block_sums);
    if (a.plan.splits > 1) add_blocks<T>(a, tile, block_sums);
  }
}

using Kernel = void (*)(Nf4LinearArguments);

template <class T, int fragments>
Kernel kernel_of(Rows kind) {
  switch (kind) {
    case kPlainRows: return nf4_linear_kernel<T, fragments, kPlainRows>;
    case kNestedRows: return nf4_linear_kernel<T, fragments, kNestedRows>;
    default: return nf4_linear_kernel<T, 2, kAnyRows>;  // one form for any number of rows of x: it is long
  }
}

Kernel kernel_for(int dtype, int m, Rows kind) {
  if (dtype == kBFloat16) return m <= 8 ? kernel_of<__nv_bfloat16, 1>(kind) : kernel_of<__nv_bfloat16, 2>(kind);
  return m <= 8 ? kernel_of<__half, 1>(kind) : kernel_of<__half, 2>(kind);
}

// Allows the kernel its shared memory on the current device. Kept by the driver, and cheap to say again.
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

struct LaunchOptions {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2];

  LaunchOptions(cudaStream_t stream, const Nf4Plan& plan, int bytes, bool overlap) {
    config.gridDim = dim3(static_cast<unsigned int>(plan.blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (plan.splits > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned int>(plan.splits), 1, 1};
    }
    if (overlap) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : 0;
}

}  // namespace

// The most that a launch can need: 16 rows, kMaxUnits units, a split.
constexpr int kMostShared = shared_bytes(16, {kMaxUnits, 1, 2, 0, 0, 0, 0});

int clusters_at_once(int device, ClustersAtOnce& clusters) {
  clusters = {};
  if (const cudaError_t error = use_device(device)) return error;
  clusters.count[0] = attribute(cudaDevAttrMultiProcessorCount, device);
  if (attribute(cudaDevAttrClusterLaunch, device) == 0) return cudaSuccess;
  if (attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) < kMostShared) return cudaSuccess;
  const Kernel kernel = nf4_linear_kernel<__nv_bfloat16, 2, kAnyRows>;
  if (const cudaError_t error = allow_shared_memory(kernel, kMostShared)) return error;
  for (int size = 1; size < kClusterSizes; ++size) {
    Nf4Plan plan{};
    plan.splits = 1 << size;
    plan.blocks = plan.splits;
    LaunchOptions options(nullptr, plan, kMostShared, false);
    if (cudaOccupancyMaxActiveClusters(&clusters.count[size], kernel, &options.config) != cudaSuccess) {
      cudaGetLastError();
      clusters.count[size] = 0;
    }
  }
  return cudaSuccess;
}

int launch_nf4_linear(Launch launch, const Nf4Weight& q, int64_t packed_bytes, int dtype, const Nf4Linear& call,
                      const Nf4Plan& plan) {
  if (call.m < 1 || call.m > kMaxTokens || !nf4_fits(q)) return cudaErrorInvalidValue;
  if (dtype != kBFloat16 && dtype != kFloat16) return cudaErrorInvalidValue;
  if (const cudaError_t error = use_device(launch.device)) return error;
  const Rows kind = !rows_are_aligned(q) ? kAnyRows : q.nested_absmax != nullptr ? kNestedRows : kPlainRows;
  const Kernel kernel = kernel_for(dtype, call.m, kind);
  const int bytes = shared_bytes(call.m <= 8 && kind != kAnyRows ? 8 : 16, plan);
  if (const cudaError_t error = allow_shared_memory(kernel, bytes)) {
    cudaGetLastError();
    return error;
  }
  const bool overlap = call.r > 0 && attribute(cudaDevAttrComputeCapabilityMajor, launch.device) >= 9;
  const LaunchOptions options(static_cast<cudaStream_t>(launch.stream), plan, bytes, overlap);
  const Nf4LinearArguments arguments{
      q, packed_words(q, packed_bytes), call.x, call.x_stride, call.bias, call.s, call.lora_B, call.s_stride,
      call.lora_B_stride, call.y, call.m, call.r, call.scaling, plan};
  const cudaError_t error = cudaLaunchKernelEx(&options.config, kernel, arguments);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace peft_kernels
