// Element types on the device: conversion to float and back with one rounding (to nearest, ties to even).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "numeric.h"

namespace peft_kernels {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void from_float(float value, float& target) { target = value; }
__device__ __forceinline__ void from_float(float value, __half& target) { target = __float2half_rn(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16& target) { target = __float2bfloat16_rn(value); }

// Calls launch(T{}) with the element type of `dtype`.
template <class Function>
int with_element(int dtype, Function launch) {
  switch (dtype) {
    case kFloat32: return launch(float{});
    case kFloat16: return launch(__half{});
    case kBFloat16: return launch(__nv_bfloat16{});
    default: return cudaErrorInvalidValue;
  }
}

// Makes `device` current. A failure is returned and cleared, or the next launch's check would report it once more.
inline cudaError_t use_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Blocks for `count` threads; kernels loop, so that a count beyond the largest grid is still covered.
inline unsigned int blocks_for(int64_t count, int threads) {
  const int64_t blocks = (count + threads - 1) / threads;
  return static_cast<unsigned int>(blocks < 0x7FFFFFFF ? blocks : 0x7FFFFFFF);
}

}  // namespace peft_kernels
