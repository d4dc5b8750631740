// y = x Wᵀ + b and dx = dY W with W in NF4, on the CPU. W is decoded to floats, each holding the weight rounded to x's
// dtype, a tile at a time in the L1 or L2 cache: a dense W never exists. Sums are in float, y and dx are rounded once.
//
// Threads share outputs, not sums, so that the bits do not depend on their number.
#include <omp.h>

#include <algorithm>

#include "buffer.h"
#include "cpu_kernels.h"
#include "nf4.h"
#include "tile_sizes.h"

namespace peft_kernels {

// Rows [row, row + m) of x and y, or in backward of dY (x) and dx (y).
struct Nf4Product {
  Nf4Weight w;
  Matrix x, bias, y;
  int64_t row, m;
};

namespace {

constexpr int kNf4FewRows = 4;
// Forward takes `kNf4RowsMax` rows of W at a time, a whole number of register tiles, and of each 256 terms.
constexpr int kNf4RowsMax = 48, kNf4Terms = 256, kNf4Stride = kNf4Terms + 16;
// Backward takes 32 rows of up to 384 columns: 48 KiB of the L2 cache. Short pieces of rows would cost a miss each.
constexpr int kNf4RowsOnce = 32, kNf4Columns = 384;
static_assert(kNf4Terms <= kNf4Columns, "tables suffice for either");
constexpr int kNf4PrefetchRows = 12;
constexpr int64_t kNf4BlockRows = 240;  // of x at a time, so that scratch stays small

// Terms between which partial sums leave the registers, so that x stays in the L1 cache.
int64_t nf4_few_rows_step(int64_t m) { return m == 1 ? 4096 : 1024; }
// An odd number of cache lines, lest the rows of x share sets of it.
int64_t nf4_few_rows_stride(int64_t k) { return (k + 31) / 32 * 32 + 16; }

}  // namespace
}  // namespace peft_kernels

#define PEFT_KERNELS_BODY "nf4_linear.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

int64_t steps(int64_t total, int64_t step) { return (total + step - 1) / step; }
int64_t whole(int64_t total, int64_t step) { return steps(total, step) * step; }

constexpr int kWidest = 32;  // columns of the widest panel: rows of x are rounded up to no more

// Starting a thread pays for itself from about 20,000 decoded weights on.
int useful_threads(const Nf4Product& job, int threads) {
  const double weights = static_cast<double>(job.w.n) * static_cast<double>(job.w.k);
  const double work = weights * (1.0 + static_cast<double>(job.m) / 8);
  return std::clamp(static_cast<int>(std::min(work / 32768.0, 1e6)), 1, std::max(threads, 1));
}

void forward_few_rows(const Nf4Product& job, int threads) {
  const int64_t stride = nf4_few_rows_stride(job.w.k), rows_once = 32;
  const auto x = allocate<float>(job.m * stride);
  for (int64_t m = 0; m < job.m; ++m)
    PEFT_KERNELS_DISPATCH(nf4_pack_row, job.x, job.row + m, job.w.k, x.get() + m * stride);
#pragma omp parallel for schedule(static) num_threads(useful_threads(job, threads))
  for (int64_t row = 0; row < job.w.n; row += rows_once)
    PEFT_KERNELS_DISPATCH(nf4_few_rows, job, row, static_cast<int>(std::min(rows_once, job.w.n - row)), x.get());
}

void forward_block(const Nf4Product& job, int threads) {
  if (job.m <= kNf4FewRows) return forward_few_rows(job, threads);
  const int wanted = useful_threads(job, threads);
  const int64_t stride = whole(job.m, kWidest), k = whole(job.w.k, 32);
  const int64_t scratch_size = kNf4RowsMax * (kNf4Stride + stride);
  const auto packed = allocate<float>(k * stride), scratch = allocate<float>(wanted * scratch_size);
  // Where each decoded weight is used for one panel only, it had better stay in the L1 cache.
  const int64_t rows_once = job.m <= PEFT_KERNELS_DISPATCH(nf4_panel, job.m) ? 12 : kNf4RowsMax;
#pragma omp parallel num_threads(wanted)
  {
#pragma omp for schedule(static)
    for (int64_t column = 0; column < job.w.k; column += 32)
      PEFT_KERNELS_DISPATCH(nf4_pack_columns, job, column, packed.get());
#pragma omp for schedule(static)
    for (int64_t row = 0; row < job.w.n; row += rows_once)
      PEFT_KERNELS_DISPATCH(nf4_forward, job, row, static_cast<int>(std::min(rows_once, job.w.n - row)), packed.get(),
                            scratch.get() + omp_get_thread_num() * scratch_size);
  }
}

void backward_block(const Nf4Product& job, int threads) {
  const int wanted = useful_threads(job, threads);
  const int64_t scratch_size = (kNf4RowsOnce + job.m) * kNf4Columns;
  // As many panels as share out evenly.
  const int64_t panels = whole(std::max<int64_t>(1, steps(job.w.k, kNf4Columns)), wanted);
  const int64_t columns = whole(steps(std::max<int64_t>(1, job.w.k), panels), 32);
  const auto scratch = allocate<float>(wanted * scratch_size);
  const auto packed = allocate<float>(job.m * whole(job.w.n, kNf4RowsOnce));
#pragma omp parallel num_threads(wanted)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < job.w.n; row += kNf4RowsOnce)
      PEFT_KERNELS_DISPATCH(nf4_pack_terms, job, row, packed.get() + row * job.m);
#pragma omp for schedule(static)
    for (int64_t column = 0; column < job.w.k; column += columns)
      PEFT_KERNELS_DISPATCH(nf4_backward, job, column, std::min(columns, job.w.k - column), packed.get(),
                            scratch.get() + omp_get_thread_num() * scratch_size);
  }
}

// Blocks of rows of almost the same size.
template <class Block>
void for_blocks(int64_t m, const Nf4Weight& w, Matrix x, Matrix bias, Matrix y, Block block) {
  if (m == 0) return;
  const int64_t rows = steps(m, steps(m, kNf4BlockRows));
  for (int64_t row = 0; row < m; row += rows) block(Nf4Product{w, x, bias, y, row, std::min(rows, m - row)});
}

}  // namespace

void nf4_linear_forward(int64_t m, const Nf4Weight& w, Matrix x, Matrix bias, Matrix y, int threads) {
  for_blocks(m, w, x, bias, y, [&](const Nf4Product& job) { forward_block(job, threads); });
}

void nf4_linear_backward(int64_t m, const Nf4Weight& w, Matrix grad_y, Matrix grad_x, int threads) {
  for_blocks(m, w, grad_y, {}, grad_x, [&](const Nf4Product& job) { backward_block(job, threads); });
}

}  // namespace peft_kernels
