// What the files that bind the CUDA kernels share.
#pragma once

#include <cstdint>

// Raises RuntimeError for the error code of a failed launch.
void check(const char* kernel, int code);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
