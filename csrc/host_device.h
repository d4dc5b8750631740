// Functions that both the device and the host compile, the host to test what the device computes.
#pragma once

#if defined(__CUDACC__)
#define PEFT_KERNELS_HOST_DEVICE __host__ __device__ __forceinline__
#define PEFT_KERNELS_UNROLL _Pragma("unroll")
#else
#define PEFT_KERNELS_HOST_DEVICE inline
#define PEFT_KERNELS_UNROLL
#endif
