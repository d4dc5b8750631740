// The passes of dora_linear over u and dY on the CPU; its low-rank half is that of lora_linear.
//
// Sums over rows are kept in float for a short chain of rows and in double for each part of the rows and in total, added
// in order: nothing but the chains rounds, and the bits do not depend on the number of threads.
#include "buffer.h"
#include "cpu_kernels.h"

#define PEFT_KERNELS_BODY "dora_linear.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

constexpr int64_t kRowChain = 16, kMaxParts = 32;
constexpr int64_t kElementsPerThread = 16384;  // starting a thread pays for itself from there on

int useful_threads(int64_t rows, int64_t columns, int threads) {
  return static_cast<int>(std::clamp<int64_t>(rows * columns / kElementsPerThread, 1, std::max(threads, 1)));
}

int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

Buffer<float> padded_copy(const float* values, int64_t columns) {
  auto copy = allocate<float>(padded(columns));
  std::fill_n(copy.get(), padded(columns), 0.0f);
  if (values) std::copy_n(values, columns, copy.get());
  return copy;
}

char* row_of(const Matrix& matrix, int64_t row) {
  return matrix.data ? static_cast<char*>(matrix.data) + row * matrix.row_stride * element_size(matrix.dtype) : nullptr;
}

}  // namespace

void dora_scale(int64_t rows, int64_t columns, Matrix u, const float* g, const float* bias, Matrix y, int threads) {
  const auto factors = padded_copy(g, columns), shifts = padded_copy(bias, columns);
#pragma omp parallel for schedule(static) num_threads(useful_threads(rows, columns, threads))
  for (int64_t row = 0; row < rows; ++row)
    PEFT_KERNELS_DISPATCH(dora_scale_row, u.dtype, row_of(u, row), factors.get(), shifts.get(), row_of(y, row), columns);
}

void dora_backward(int64_t rows, int64_t columns, Matrix grad_y, Matrix u, const float* g, Matrix grad_u,
                   float* products, float* sums, int threads) {
  const auto factors = padded_copy(g, columns);
  const int64_t chains = (rows + kRowChain - 1) / kRowChain, parts = std::clamp<int64_t>(chains / 4, 1, kMaxParts);
  const int64_t width = padded(columns);
  const auto chain_sums = allocate<float>(parts * 2 * width);  // of each part: products, sums
  const auto part_sums = allocate<double>(parts * 2 * width);
  std::fill_n(chain_sums.get(), parts * 2 * width, 0.0f);
  std::fill_n(part_sums.get(), parts * 2 * width, 0.0);
#pragma omp parallel for schedule(static) num_threads(useful_threads(rows, columns, threads))
  for (int64_t part = 0; part < parts; ++part) {
    float* chain = chain_sums.get() + part * 2 * width;
    const int64_t end = std::min(rows, chains * (part + 1) / parts * kRowChain);
    for (int64_t row = chains * part / parts * kRowChain; row < end; ++row) {
      PEFT_KERNELS_DISPATCH(dora_backward_row, grad_y.dtype, row_of(grad_y, row), row_of(u, row), factors.get(),
                            row_of(grad_u, row), chain, chain + width, columns);
      if ((row + 1) % kRowChain == 0 || row + 1 == end)
        PEFT_KERNELS_DISPATCH(add_and_clear, part_sums.get() + part * 2 * width, chain, 2 * width);
    }
  }
  for (int64_t i = 0; i < columns; ++i) {
    double product = 0, sum = 0;
    for (int64_t part = 0; part < parts; ++part) {
      product += part_sums[part * 2 * width + i];
      sum += part_sums[part * 2 * width + width + i];
    }
    if (products) products[i] = static_cast<float>(product);
    if (sums) sums[i] = static_cast<float>(sum);
  }
}

}  // namespace peft_kernels
