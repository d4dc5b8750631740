// Counter-based dropout on the CPU: several Philox counters per vector, rows cut into runs that threads share.
#include "cpu_kernels.h"

namespace peft_kernels {
constexpr int64_t kDropoutRun = 1024;  // elements per task, a multiple of 8: masks of one run stay in the L1 cache
}

#define PEFT_KERNELS_BODY "philox_dropout.h"
#include "simd/each.h"

namespace peft_kernels {

void philox_dropout(Matrix x, void* out, int64_t rows, int64_t columns, int64_t row_offset, Dropout dropout,
                    int threads) {
  const int64_t runs = (columns + kDropoutRun - 1) / kDropoutRun, size = element_size(x.dtype);
  // Starting a thread pays for itself from a few runs on.
  threads = static_cast<int>(std::clamp<int64_t>(rows * columns / (8 * kDropoutRun), 1, std::max(threads, 1)));
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const uint64_t groups = static_cast<uint64_t>(philox_groups(columns));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < rows * runs; ++task) {
    const int64_t row = task / runs, first = task % runs * kDropoutRun;
    const int64_t length = columns - first < kDropoutRun ? columns - first : kDropoutRun;
    const uint64_t counter = static_cast<uint64_t>(row + row_offset) * groups + first / kPhiloxLanes;
    PEFT_KERNELS_DISPATCH(dropout, static_cast<const char*>(x.data) + (row * x.row_stride + first) * size,
                          static_cast<char*>(out) + (row * columns + first) * size, length, x.dtype, seed, counter,
                          dropout.threshold, dropout.scale);
  }
}

}  // namespace peft_kernels
