// Vector widths of the CPU kernels: compiled side by side, chosen at run time.
#pragma once

#if defined(__x86_64__)
#define PEFT_KERNELS_X86 1
#else
#define PEFT_KERNELS_X86 0
#endif

#define PEFT_KERNELS_INLINE inline __attribute__((always_inline))

namespace peft_kernels {

enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512"};

// Whether this processor and operating system run code of that width.
inline bool isa_supported(int isa) {
#if PEFT_KERNELS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == kAvx2) return avx2;
  if (isa == kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == kPortable;
}

inline int widest_isa() { return isa_supported(kAvx512) ? kAvx512 : isa_supported(kAvx2) ? kAvx2 : kPortable; }

// The width in force: the widest one, until a test asks for another.
int current_isa();
void set_isa(int isa);

}  // namespace peft_kernels

// Calls `function` of the namespace of the width in force.
#if PEFT_KERNELS_X86
#define PEFT_KERNELS_DISPATCH(function, ...)                                            \
  (::peft_kernels::current_isa() == ::peft_kernels::kAvx512 ? avx512::function(__VA_ARGS__) \
   : ::peft_kernels::current_isa() == ::peft_kernels::kAvx2 ? avx2::function(__VA_ARGS__)   \
                                                             : portable::function(__VA_ARGS__))
#else
#define PEFT_KERNELS_DISPATCH(function, ...) portable::function(__VA_ARGS__)
#endif
