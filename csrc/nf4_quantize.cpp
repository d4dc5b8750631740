// Weights to NF4 on the CPU: of each block the largest magnitude, then the indices of value / absmax.
#include "cpu_kernels.h"
#include "nf4.h"
#include "tile_sizes.h"

namespace peft_kernels {
namespace {
constexpr int64_t kNf4MaxBlock = 4096;
constexpr float kNf4LeastScale = 1e-38f;  // of bitsandbytes: what a block of zeros is divided by
}
}  // namespace peft_kernels

#define PEFT_KERNELS_BODY "nf4_quantize.h"
#include "simd/each.h"

namespace peft_kernels {

void nf4_quantize(const void* values, int dtype, int64_t count, int64_t blocksize, uint8_t* packed, float* absmax,
                  int threads) {
  constexpr int64_t piece = 8 * kNf4MaxBlock;  // whole blocks of any size
  const int wanted = static_cast<int>(std::clamp<int64_t>(count / piece, 1, std::max(threads, 1)));
#pragma omp parallel for schedule(static) num_threads(wanted)
  for (int64_t begin = 0; begin < count; begin += piece)
    PEFT_KERNELS_DISPATCH(nf4_quantize_run, dtype, values, begin, std::min(count, begin + piece), blocksize, packed,
                          absmax);
}

}  // namespace peft_kernels
