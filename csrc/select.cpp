// Radix selection of the k largest numbers on the CPU: counts of digits, bound by memory, and the mask of what is kept.
// Counts are integers: the same at any number of threads.
#include "select.h"

#include <limits>

#include "buffer.h"
#include "cpu_kernels.h"

#define PEFT_KERNELS_BODY "select.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

constexpr int64_t kElementsPerThread = 32768;  // starting a thread pays for itself from there on

int useful_threads(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, std::max(threads, 1)));
}

}  // namespace

void select_count(const float* data, int64_t count, int top, int low, int32_t prefix, int64_t* counts, int threads) {
  const int team = useful_threads(count, threads);
  const int64_t bins = int64_t{1} << (top - low), size = (bins + 1) * 4;
  const auto own = allocate<uint32_t>(team * size);
#pragma omp parallel for schedule(static) num_threads(team)
  for (int worker = 0; worker < team; ++worker) {
    const int64_t begin = count / team * worker, end = worker + 1 == team ? count : count / team * (worker + 1);
    uint32_t* mine = own.get() + worker * size;
    std::fill_n(mine, size, 0u);
    PEFT_KERNELS_DISPATCH(select_count_piece, data + begin, end - begin, top, low, prefix, mine);
  }
  for (int worker = 0; worker < team; ++worker)
    for (int64_t i = 0; i < bins * 4; ++i) counts[i / 4] += own[worker * size + i];
}

int64_t select_keep(const float* data, int64_t rows, int64_t columns, int32_t last, int64_t wanted, uint32_t* words,
                    int threads) {
  const int team = useful_threads(rows * columns, threads);
  const auto before = allocate<int64_t>(rows + 1);
  const int64_t row_words = (columns + 31) / 32;
  before[0] = 0;
#pragma omp parallel for schedule(static) num_threads(team)
  for (int64_t row = 0; row < rows; ++row)
    before[row + 1] = PEFT_KERNELS_DISPATCH(select_ties, data + row * columns, columns, last);
  for (int64_t row = 0; row < rows; ++row) before[row + 1] += before[row];
#pragma omp parallel for schedule(static) num_threads(team)
  for (int64_t row = 0; row < rows; ++row)
    PEFT_KERNELS_DISPATCH(select_keep_row, data + row * columns, columns, last,
                          std::max<int64_t>(0, wanted - before[row]), words + row * row_words);
  return before[rows];
}

}  // namespace peft_kernels
