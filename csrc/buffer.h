// Memory of the CPU kernels.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// Uninitialised, aligned to a cache line. Allocated before a parallel region: nothing may throw inside one.
template <class T>
Buffer<T> allocate(int64_t count) {
  const int64_t bytes = std::max<int64_t>(1, count) * static_cast<int64_t>(sizeof(T));
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

// A fresh tensor's pages are zeroed at the first touch, which in pages of 4 KiB takes longer than decoding into them:
// 32 MiB took 30 ms, and 5 ms in pages of 2 MiB. It is but advice: where it is refused nothing is lost.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin + page < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace peft_kernels
