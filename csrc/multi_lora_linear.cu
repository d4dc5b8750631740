// y_j[m] += sum over i of w[m, i] s_a (x[m] A_aj^T) B_aj^T with a = ids[m, i], for the decode step of many adapters:
// one launch for all tokens and all projections, ids in any order, no scratch memory, no atomics, nothing read by the
// host.
//
// Floor, K = N = 4096, r = 16, bfloat16: A and B of each token's adapter once, 256 KiB, and y twice: 16 MiB for 64
// distinct adapters, 4.1 us at 4.3 TB/s, and the launch; 67 MB for 256, 16.6 us. PREDICTED by arithmetic, never
// measured (H200): 1 token 5-5.5 us, 16 tokens 5.5-6.5, 64 tokens 9-10.5, 256 tokens 23-26. Never run on a GPU.
//
// How the work is divided: multi_lora.h. What a block does: multi_lora_block.cuh.
#include <type_traits>

#include "cuda_element.cuh"
#include "cuda_kernels.h"
#include "multi_lora_block.cuh"

namespace peft_kernels {
namespace {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The machine of multi_lora_block.cuh. Loads are volatile and no `ld.global.nc`: those the compiler moves below
// barriers.
struct Gpu {
#if __CUDA_ARCH__ >= 900
  static constexpr bool kClusters = true;
#else
  static constexpr bool kClusters = false;
#endif
  char* memory;
  uint32_t address;

  __device__ explicit Gpu(char* shared) : memory(shared), address(shared_address(shared)) {}

  // Volatile, so that the two halves of the kernel each read it.
  __device__ __forceinline__ Place place() const {
    Place place;
    asm volatile("mov.u32 %0, %ctaid.y;" : "=r"(place.token));
    asm volatile("mov.u32 %0, %ctaid.z;" : "=r"(place.projection));
    asm volatile("mov.u32 %0, %ctaid.x;" : "=r"(place.part));
    return place;
  }
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  // Of lane 0, so that the compiler knows it to be the same in all lanes.
  __device__ __forceinline__ int warp() const {
    return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0);
  }
  __device__ __forceinline__ float from_lane_xor(float value, int distance) const {
    return __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }

  template <class T>
  __device__ __forceinline__ T& shared(int offset) const {
    return *reinterpret_cast<T*>(memory + offset);
  }

  template <class T>
  __device__ __forceinline__ T load(const void* from) const {
    if constexpr (sizeof(T) == 2) {
      uint16_t value;
      asm volatile("ld.global.u16 %0, [%1];" : "=h"(value) : "l"(from) : "memory");
      return value;
    } else if constexpr (sizeof(T) == 4) {
      uint32_t value;
      asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
      return value;
    } else {
      uint64_t value;
      asm volatile("ld.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
      return static_cast<T>(value);
    }
  }
  __device__ __forceinline__ Words load16(const void* from) const {
    Words words;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.w[0]), "=r"(words.w[1]), "=r"(words.w[2]), "=r"(words.w[3]) : "l"(from) : "memory");
    return words;
  }
  // What nobody else in the block reads.
  __device__ __forceinline__ Words load16_once(const void* from) const {
    Words words;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.w[0]), "=r"(words.w[1]), "=r"(words.w[2]), "=r"(words.w[3]) : "l"(from) : "memory");
    return words;
  }
  template <int width>
  __device__ __forceinline__ Words load_x(const void* from) const {
    if constexpr (width == 8) return load16(from);
    Words words{};
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(words.w[0]), "=r"(words.w[1]) : "l"(from) : "memory");
    return words;
  }
  template <class T>
  __device__ __forceinline__ void store(void* to, T value) const {
    *static_cast<T*>(to) = value;
  }

  // 16 bytes to shared memory.
  __device__ __forceinline__ void copy(int offset, const void* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address + offset), "l"(from) : "memory");
  }
  // Of which only the first `bytes` are read and the others 0.
  __device__ __forceinline__ void copy_part(int offset, const void* from, int bytes) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(address + offset), "l"(from), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  __device__ __forceinline__ void wait_for_copies(int younger) const {
    if (younger == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
    else asm volatile("cp.async.wait_group 1;" ::: "memory");
  }

#if __CUDA_ARCH__ >= 900
  __device__ __forceinline__ void team_begin() const {
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(address) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(address + 8) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void team_wait() const { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
  __device__ __forceinline__ void expect(int set, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address + 8 * set), "r"(bytes)
                 : "memory");
  }
  // Into another block's shared memory. It counts at that block's barrier: no fence, and nobody waits for it here.
  __device__ __forceinline__ void send(int block, int offset, float value, int set) const {
    uint32_t to, barrier;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address + offset), "r"(block));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(address + 8 * set), "r"(block));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 :: "r"(to), "r"(__float_as_uint(value)), "r"(barrier) : "memory");
  }
  __device__ __forceinline__ void wait(int set, int parity) const {
    uint32_t done;
    do {
      asm volatile("{\n.reg .pred p;\n"
                   "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                   "selp.u32 %0, 1, 0, p;\n}"
                   : "=r"(done) : "r"(address + 8 * set), "r"(parity) : "memory");
    } while (done == 0);
  }
#else
  __device__ __forceinline__ void team_begin() const {}
#endif
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
multi_lora_kernel(const __grid_constant__ MultiLoraArguments a) {
  extern __shared__ __align__(128) char shared[];
  Gpu gpu(shared);
  multi_lora_block<Shape>(gpu, a);
}

template <class Shape>
cudaError_t launch_shape(Launch launch, const MultiLora& call) {
  int major = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, launch.device))
    return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, launch.device))
    return error;
  const bool clusters = major >= 9;
  const int team =
      clusters ? kTeam : team_without_clusters(call.tokens * call.projections, most_rows(call), multiprocessors);
  const MultiLoraArguments arguments = multi_lora_arguments<Shape>(call, team);
  const int bytes = Shape::shared_bytes(arguments.choices, arguments.stages);
  const auto kernel = multi_lora_kernel<Shape>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>(team), static_cast<unsigned int>(call.tokens),
                        static_cast<unsigned int>(call.projections));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kTeam, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = clusters ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace

int launch_multi_lora_linear(Launch launch, const MultiLora& call) {
  if (!multi_lora_fits(call)) return cudaErrorInvalidValue;
  if (const cudaError_t error = use_device(launch.device)) return error;
  cudaError_t error = cudaErrorInvalidValue;
  with_multi_lora_shape(call.x_type, call.a_type, call.rank,
                        [&](auto shape) { error = launch_shape<decltype(shape)>(launch, call); });
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace peft_kernels
