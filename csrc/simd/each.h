// Compiles PEFT_KERNELS_BODY once per vector width, each copy in a namespace of its own with the same names.
//
// The copies differ in `#pragma GCC target`, not in compiler flags, so one object file runs on every processor and no
// inline function of the standard library can leak out compiled for wider vectors than the machine has.
// No include guard: a .cpp file includes this once, after defining the body.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../isa.h"
#include "../numeric.h"
#include "../philox.h"

#if PEFT_KERNELS_X86
#include <immintrin.h>
#endif

#define PEFT_KERNELS_VECTOR_BYTES 16
namespace peft_kernels::portable {
#include "vector.h"
#include PEFT_KERNELS_BODY
}  // namespace peft_kernels::portable
#undef PEFT_KERNELS_VECTOR_BYTES

#if PEFT_KERNELS_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define PEFT_KERNELS_VECTOR_BYTES 32
namespace peft_kernels::avx2 {
#include "vector.h"
#include PEFT_KERNELS_BODY
}  // namespace peft_kernels::avx2
#undef PEFT_KERNELS_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define PEFT_KERNELS_VECTOR_BYTES 64
namespace peft_kernels::avx512 {
#include "vector.h"
#include PEFT_KERNELS_BODY
}  // namespace peft_kernels::avx512
#undef PEFT_KERNELS_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // PEFT_KERNELS_X86
