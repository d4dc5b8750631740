// y = x Wᵀ + b, dx = dY W and dW of the kept blocks, with W block-sparse, on the CPU. Sums are in float; y, dx and dW are
// rounded once.
//
// Threads share outputs, not sums, so that the bits do not depend on their number: block rows, those with the most blocks
// first, each for all rows of x.
#include <omp.h>

#include <algorithm>

#include "buffer.h"
#include "cpu_kernels.h"
#include "tile_sizes.h"

namespace peft_kernels {

// Rows up to which a block is not turned for forward.
constexpr int64_t kBlockFewRows = 4;
// Rows of dY and x whose products are summed in registers: two pieces of 64 columns fill the L1 cache.
constexpr int64_t kBlockTerms = 64;
// Rows of x at a time, so that scratch stays small and a block row's sums in the L2 cache.
constexpr int64_t kBlockRowsOnce = 240;

// What simd/block_linear.h computes. A block row of y (`order` null: blocks are turned) or a block column of dx: blocks
// [begin, end), of which block i meets the block of columns `others[i]` of the packed operand [blocks of columns,
// packed_rows, block].
struct BlockLine {
  int64_t block;
  Matrix values;  // [blocks * block, block]
  const float* packed;
  int64_t packed_rows, packed_row;
  const int32_t *others, *order;
  int64_t begin, end;
  Matrix bias, out;
  int64_t row, m, column, columns;
};

struct BlockGradient {
  int64_t block, m, n, k;
  Matrix grad_y, x, out;
  int64_t place, row, column;
};

}  // namespace peft_kernels

#define PEFT_KERNELS_BODY "block_linear.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

int64_t steps(int64_t total, int64_t step) { return (total + step - 1) / step; }

// Starting a thread pays for itself from about 100,000 multiply-adds on.
int useful_threads(double products, int threads) {
  return std::clamp(static_cast<int>(std::min(products / 100e3, 1e6)), 1, std::max(threads, 1));
}

// The lines (block rows of y, block columns of dx) for rows [row, row + m) of the operand.
struct Lines {
  const BlockMatrix& w;
  const int32_t *starts, *others, *order, *longest;
  int64_t lines, line_size, others_size;  // line_size: columns of the result, others_size: of the operand
  Matrix operand, bias, out;
};

void lines_of_rows(const Lines& job, int64_t row, int64_t m, int threads) {
  const int64_t block = job.w.block, columns = steps(job.others_size, block);
  const int wanted = useful_threads(static_cast<double>(job.w.blocks * block) * static_cast<double>(block * m), threads);
  // Where there are few lines, each is shared by rows.
  const int64_t parts = std::clamp<int64_t>(steps(4 * wanted, std::max<int64_t>(1, job.lines)), 1, steps(m, 24));
  const int64_t rows = steps(m, parts);
  const int64_t scratch_size = (2 * block + rows) * block;
  const auto packed = allocate<float>(columns * m * block), scratch = allocate<float>(wanted * scratch_size);
#pragma omp parallel num_threads(wanted)
  {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < columns; ++c)
      PEFT_KERNELS_DISPATCH(block_pack, job.operand, row, m, c * block, std::min(block, job.others_size - c * block),
                            block, packed.get() + c * m * block);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < job.lines * parts; ++i) {
      const int64_t line = job.longest[i / parts], first = i % parts * rows, column = line * block;
      if (first >= m) continue;
      const BlockLine one{block, job.w.values, packed.get(), m, first, job.others, job.order, job.starts[line],
                          job.starts[line + 1], job.bias, job.out, row + first, std::min(rows, m - first), column,
                          std::min(block, job.line_size - column)};
      PEFT_KERNELS_DISPATCH(block_line, one, scratch.get() + omp_get_thread_num() * scratch_size);
    }
  }
}

void for_rows(int64_t m, const Lines& job, int threads) {
  if (m == 0) return;
  const int64_t rows = steps(m, steps(m, kBlockRowsOnce));
  for (int64_t row = 0; row < m; row += rows) lines_of_rows(job, row, std::min(rows, m - row), threads);
}

}  // namespace

void block_linear_forward(int64_t m, const BlockMatrix& w, Matrix x, Matrix bias, Matrix y, int threads) {
  for_rows(m, {w, w.row_starts, w.columns, nullptr, w.long_rows, steps(w.n, w.block), w.n, w.k, x, bias, y}, threads);
}

void block_linear_backward(int64_t m, const BlockMatrix& w, Matrix grad_y, Matrix grad_x, int threads) {
  for_rows(m, {w, w.column_starts, w.rows, w.order, w.long_columns, steps(w.k, w.block), w.k, w.n, grad_y, {}, grad_x},
           threads);
}

void block_linear_gradient(int64_t m, const BlockMatrix& w, Matrix grad_y, Matrix x, Matrix grad, int threads) {
  const int64_t block = w.block, scratch_size = (2 * kBlockTerms + block) * block;
  const int wanted = useful_threads(static_cast<double>(w.blocks * block) * static_cast<double>(block * m), threads);
  const auto scratch = allocate<float>(wanted * scratch_size);
  // By columns: a block column of x stays in the L2 cache.
#pragma omp parallel for schedule(static) num_threads(wanted)
  for (int64_t i = 0; i < w.blocks; ++i) {
    const int64_t place = w.order[i];
    const BlockGradient one{block, m, w.n, w.k, grad_y, x, grad, place, w.rows[i], w.columns[place]};
    PEFT_KERNELS_DISPATCH(block_gradient, one, scratch.get() + omp_get_thread_num() * scratch_size);
  }
}

}  // namespace peft_kernels
