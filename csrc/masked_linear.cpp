// y = x (W ⊙ M)ᵀ + b, dx = dY (W ⊙ M) and dW = (dYᵀ x) ⊙ M on the CPU, with W dense or in NF4, and with an update of low
// rank under the mask, or with changes of chosen weights (sparse_delta_linear where many are chosen). Masked weights exist as floats, each holding a weight rounded to x's dtype, a tile at a time in
// the L2 cache. Sums are in float, results are rounded once.
//
// Threads share outputs, not sums, so that the bits do not depend on their number.
#include <omp.h>

#include "buffer.h"
#include "cpu_kernels.h"
#include "tile_sizes.h"

namespace peft_kernels {

enum MaskedKind : int { kMaskedForward, kMaskedGradX, kMaskedGradWeight };

// The weight as the products read it. The update is B [n, update_ranks] times A [r, update_stride], B scaled, both in
// float.
struct MaskedWeight {
  Matrix dense;   // null: NF4, or without that either zeros
  Nf4Weight nf4;
  MaskWords words;
  int64_t r = 0, update_ranks = 0, update_stride = 0;
  const float *update_A = nullptr, *update_B = nullptr;
  int64_t n = 0, k = 0;
  MaskedPlaces changes{};
  const int64_t* piece_starts = nullptr;  // of the changes
};

struct MaskedProduct {
  MaskedKind kind;
  int64_t rows, columns, terms;
  Matrix left;                 // of grad_weight dY, turned
  const MaskedWeight* weight;  // null in grad_weight
  Matrix x, bias, out;         // x in grad_weight only
  MaskWords words;             // of out
  const MaskedPlaces* places;  // what is gathered in place of out
};

namespace {

// A block of out has up to 256 rows and 256 columns and takes up to 64 terms at a time: 0.41 MiB of each thread's L2
// cache. Wide blocks read left the fewest times; more terms and fewer columns took up to 1.1 times as long. Strides are
// odd numbers of cache lines, lest rows share sets of it.
constexpr int kMaskedRows = 256, kMaskedColumns = 256, kMaskedTerms = 64;
constexpr int kMaskedLeftStride = kMaskedTerms + 16, kMaskedTurnedStride = kMaskedRows + 16;
constexpr int kMaskedRightStride = kMaskedColumns + 16;
constexpr int64_t kMaskedLeft = kMaskedRows * kMaskedLeftStride;
constexpr int64_t kMaskedScratch = kMaskedLeft + (kMaskedTerms + kMaskedRows) * kMaskedRightStride;
constexpr int kMaskedPiece = kMaskedColumns;  // the most weights of a row that are taken at once
constexpr int kMaskedPrefetchRows = 8;
static_assert(kMaskedTerms * kMaskedTurnedStride <= kMaskedLeft, "either form of left fits");
static_assert(kMaskedTerms <= kMaskedPiece, "rows of either direction fit");

}  // namespace
}  // namespace peft_kernels

#define PEFT_KERNELS_BODY "masked_linear.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

int64_t steps(int64_t total, int64_t step) { return (total + step - 1) / step; }
int64_t whole(int64_t total, int64_t step) { return steps(total, step) * step; }

// Starting a thread pays for itself from about 250,000 multiplications on.
int useful_threads(const MaskedProduct& job, int threads) {
  const double work = static_cast<double>(job.rows) * static_cast<double>(job.columns) *
                      static_cast<double>(std::max<int64_t>(job.terms, 1));
  return std::clamp(static_cast<int>(std::min(work / 262144.0, 1e6)), 1, std::max(threads, 1));
}

// All rows of a strip of columns by one thread, so that what it reads of W comes from memory once.
void run(const MaskedProduct& job, int threads) {
  if (job.rows == 0 || job.columns == 0) return;
  const int wanted = useful_threads(job, threads);
  const int64_t strips = whole(steps(job.columns, kMaskedColumns), wanted);  // that share out evenly
  const int64_t columns = whole(steps(job.columns, strips), 32), rows = steps(job.rows, steps(job.rows, kMaskedRows));
  const auto scratch = allocate<float>(wanted * kMaskedScratch);
#pragma omp parallel for schedule(static) num_threads(wanted)
  for (int64_t column = 0; column < job.columns; column += columns)
    for (int64_t row = 0; row < job.rows; row += rows)
      PEFT_KERNELS_DISPATCH(masked_block, job, row, std::min(rows, job.rows - row), column,
                            std::min(columns, job.columns - column),
                            scratch.get() + omp_get_thread_num() * kMaskedScratch);
}

// Where the places of each piece of a row begin, [n * pieces + 1].
template <class Index>
Buffer<int64_t> piece_starts(const MaskedPlaces& places, int64_t n, int64_t k) {
  const int64_t pieces = steps(k, kMaskedPiece);
  auto starts = allocate<int64_t>(n * pieces + 1);
  const auto* flat = static_cast<const Index*>(places.flat);
  int64_t place = 0;
  for (int64_t row = 0; row < n; ++row) {
    const int64_t stop = places.starts[row / places.strip + 1];
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = row * k + piece * kMaskedPiece;
      while (place < stop && flat[place] < first) ++place;
      starts[row * pieces + piece] = place;
    }
  }
  starts[n * pieces] = n ? places.starts[steps(n, places.strip)] : 0;
  return starts;
}

// The weight with its update in float and its changes by rows, which lasts as long as this does.
struct Updated {
  Buffer<float> A, B;
  Buffer<int64_t> starts;
  MaskedWeight weight;

  Updated(const MaskedOperand& w) {
    weight.dense = w.dense, weight.nf4 = w.nf4, weight.words = w.words, weight.n = w.n, weight.k = w.k;
    if (w.changes.flat) {
      starts = w.changes.wide ? piece_starts<int64_t>(w.changes, w.n, w.k) : piece_starts<int32_t>(w.changes, w.n, w.k);
      weight.changes = w.changes, weight.piece_starts = starts.get();
    }
    if (w.r == 0) return;
    const int64_t stride = whole(w.k, 32) + 16, ranks = whole(w.r, 32);  // A: rows share no sets of the cache
    A = allocate<float>(w.r * stride), B = allocate<float>(w.n * ranks);
    PEFT_KERNELS_DISPATCH(update_floats, w.lora_A, w.r, w.k, 1.0f, A.get(), stride);
    PEFT_KERNELS_DISPATCH(update_floats, w.lora_B, w.n, w.r, static_cast<float>(w.scaling), B.get(), ranks);
    weight.r = w.r, weight.update_ranks = ranks, weight.update_stride = stride;
    weight.update_A = A.get(), weight.update_B = B.get();
  }
};

}  // namespace

void masked_linear_forward(int64_t m, const MaskedOperand& w, Matrix x, Matrix bias, Matrix y, int threads) {
  const Updated updated(w);
  run({kMaskedForward, m, w.n, w.k, x, &updated.weight, {}, bias, y, {}, nullptr}, threads);
}

void masked_linear_grad_x(int64_t m, const MaskedOperand& w, Matrix grad_y, Matrix grad_x, int threads) {
  const Updated updated(w);
  run({kMaskedGradX, m, w.k, w.n, grad_y, &updated.weight, {}, {}, grad_x, {}, nullptr}, threads);
}

void masked_linear_grad_weight(int64_t m, int64_t n, int64_t k, Matrix grad_y, Matrix x, MaskWords words,
                               Matrix grad_weight, int threads) {
  run({kMaskedGradWeight, n, k, m, grad_y, nullptr, x, {}, grad_weight, words, nullptr}, threads);
}

void masked_linear_grad_values(int64_t m, int64_t n, int64_t k, Matrix grad_y, Matrix x, const MaskedPlaces& places,
                               int threads) {
  run({kMaskedGradWeight, n, k, m, grad_y, nullptr, x, {}, {}, {}, &places}, threads);
}

}  // namespace peft_kernels
