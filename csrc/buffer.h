// Uninitialised memory of the CPU kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace peft_kernels {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Aligned to a cache line. Allocated before a parallel region: nothing may throw inside one.
template <class T>
Buffer<T> allocate(int64_t count) {
  const int64_t bytes = std::max<int64_t>(1, count) * static_cast<int64_t>(sizeof(T));
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

}  // namespace peft_kernels
