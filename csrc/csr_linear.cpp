// y = x Wᵀ + b and dx = dY W with W as kept numbers and their columns, on the CPU. Sums are in float, rounded once.
//
// A kept number meets 16 rows of x at a time, turned to [K, 16]: a cache line, wherever its column is, as in
// sparse_delta_linear.cpp. Few rows are dots: a turned block would be mostly empty.
//
// Threads share blocks of rows, or where there are few rows of W, never sums: the bits do not depend on their number.
#include "csr_linear.h"

#include "buffer.h"

#define PEFT_KERNELS_BODY "csr_linear.h"
#include "simd/each.h"
#include "turned_rows.h"

namespace peft_kernels {
namespace {

constexpr int64_t kDotRows = 3;                // up to so many rows are dots
constexpr int64_t kColumnChain = 64;           // terms of a column of dx that are summed at a time, about
constexpr int64_t kProductsPerThread = 32768;  // starting a thread pays for itself from there on

int useful_threads(int64_t m, const CsrWeight& w, int threads) {
  const int64_t products = int64_t{w.starts[w.n]} * kCsrGroup * std::min<int64_t>(m, 256);
  return static_cast<int>(std::clamp<int64_t>(products / kProductsPerThread, 1, std::max(threads, 1)));
}

char* at(Matrix matrix, int64_t row, int64_t column) {
  return static_cast<char*>(matrix.data) + (row * matrix.row_stride + column) * element_size(matrix.dtype);
}

// Rows of floats that results are collected in: they begin as the bias.
struct Collected {
  float* rows;
  int64_t columns;

  float* row(int64_t i) const { return rows + i * padded(columns); }

  void begin(int64_t count, Matrix bias, int64_t column) const {
    for (int64_t i = 0; i < count; ++i) {
      if (bias.data == nullptr) std::fill_n(row(i), columns, 0.0f);
      else if (i > 0) std::copy_n(row(0), columns, row(i));
      else PEFT_KERNELS_DISPATCH(delta_widen, bias.dtype, at(bias, 0, column), columns, row(0));
    }
  }

  void add_turned(int64_t count, const float* panel) const {
    const Matrix target{rows, padded(columns), kFloat32};
    BlockRows{nullptr, count, target, columns, nullptr}.add(0, panel);
  }

  void store(int64_t count, Matrix out, int64_t first, int64_t column) const {
    for (int64_t i = 0; i < count; ++i)
      PEFT_KERNELS_DISPATCH(csr_narrow, out.dtype, row(i), columns, at(out, first + i, column));
  }
};

template <class Index>
void dots(int64_t m, const CsrWeight& w, Matrix x, Matrix bias, Matrix y, int threads) {
  const int team = useful_threads(m, w, threads);
  const auto cuts = cut_rows(w.starts, w.n, team);
  const int64_t width = padded(w.k + 1);
  const auto rows = allocate<float>(m * width), sums = allocate<float>(m * padded(w.n));
  const auto biases = allocate<float>(padded(w.n));
  const Collected bias_row{biases.get(), w.n};
  bias_row.begin(1, bias, 0);
  for (int64_t i = 0; i < m; ++i) {
    PEFT_KERNELS_DISPATCH(delta_widen, x.dtype, at(x, i, 0), w.k, rows.get() + i * width);
    rows[i * width + w.k] = 0.0f;
  }
#pragma omp parallel for schedule(static) num_threads(team)
  for (int worker = 0; worker < team; ++worker) {
    const int64_t begin = cuts[worker], count = cuts[worker + 1] - begin;
    for (int64_t i = 0; i < m; ++i) {
      float* to = sums.get() + i * padded(w.n);
      PEFT_KERNELS_DISPATCH(csr_dots<Index>, w, begin, begin + count, rows.get() + i * width, to);
      for (int64_t n = begin; n < begin + count; ++n) to[n] += biases[n];
      PEFT_KERNELS_DISPATCH(csr_narrow, y.dtype, to + begin, count, at(y, i, begin));
    }
  }
}

template <class Index>
void forward(int64_t m, const CsrWeight& w, Matrix x, Matrix bias, Matrix y, int threads) {
  const int team = useful_threads(m, w, threads);
  const int64_t blocks = (m + kRows - 1) / kRows;
  // Few blocks are shared among threads by rows of W, each of which turns the block anew.
  const int64_t parts = blocks < team ? (team + blocks - 1) / blocks : 1;
  const auto cuts = cut_rows(w.starts, w.n, parts);
  const auto zeros = zero_floats(padded(w.k));
  const int64_t copies = kRows * std::max(x.dtype == kFloat32 ? 0 : padded(w.k), padded(w.n));
  const int64_t size = copies + padded((w.k + 1 + w.n) * kRows);
  const auto scratch = allocate<float>(team * size);
#pragma omp parallel for schedule(static) num_threads(team)
  for (int worker = 0; worker < team; ++worker) {
    float *copy = scratch.get() + worker * size, *panel = copy + copies, *out = panel + (w.k + 1) * kRows;
    for (int64_t task = blocks * parts * worker / team; task < blocks * parts * (worker + 1) / team; ++task) {
      const int64_t first = task / parts * kRows, begin = cuts[task % parts], end = cuts[task % parts + 1];
      const int64_t count = std::min(kRows, m - first);
      BlockRows{nullptr, m, x, w.k, zeros.get()}.turn(first, copy, panel);
      std::fill_n(panel + w.k * kRows, kRows, 0.0f);
      PEFT_KERNELS_DISPATCH(csr_forward<Index>, w, begin, end, panel, out);
      const Collected collected{copy, end - begin};
      collected.begin(count, bias, begin);
      collected.add_turned(count, out + begin * kRows);
      collected.store(count, y, first, begin);
    }
  }
}

template <class Index>
void backward(int64_t m, const CsrWeight& w, Matrix grad_y, Matrix grad_x, int threads) {
  const int64_t blocks = (m + kRows - 1) / kRows;
  const int team = static_cast<int>(std::min<int64_t>(useful_threads(m, w, threads), blocks));
  const auto zeros = zero_floats(padded(w.n));
  const int64_t copies = kRows * std::max(grad_y.dtype == kFloat32 ? 0 : padded(w.n), padded(w.k));
  const int64_t wide = (w.k + 1) * kRows, size = copies + w.n * kRows + 2 * wide;
  const auto scratch = allocate<float>(team * size);
  // Rows of W that add about kColumnChain terms to a column.
  const int64_t kept = std::max<int64_t>(1, int64_t{w.starts[w.n]} * kCsrGroup);
  const int64_t rows = std::clamp<int64_t>(kColumnChain * w.n / kept * w.k + 1, kColumnChain, w.n);
#pragma omp parallel for schedule(static) num_threads(team)
  for (int worker = 0; worker < team; ++worker) {
    float *copy = scratch.get() + worker * size, *turned = copy + copies;
    float *part = turned + w.n * kRows, *total = part + wide;
    for (int64_t block = blocks * worker / team; block < blocks * (worker + 1) / team; ++block) {
      const int64_t first = block * kRows, count = std::min(kRows, m - first);
      BlockRows{nullptr, m, grad_y, w.n, zeros.get()}.turn(first, copy, turned);
      std::fill_n(part, 2 * wide, 0.0f);
      for (int64_t begin = 0; begin < w.n; begin += rows) {
        PEFT_KERNELS_DISPATCH(csr_grad_x<Index>, w, begin, std::min(begin + rows, w.n), turned, part);
        PEFT_KERNELS_DISPATCH(csr_flush, wide, part, total);
      }
      const Collected collected{copy, w.k};
      collected.begin(count, {}, 0);
      collected.add_turned(count, total);
      collected.store(count, grad_x, first, 0);
    }
  }
}

}  // namespace

void csr_linear_forward(int64_t m, const CsrWeight& w, Matrix x, Matrix bias, Matrix y, int threads) {
  if (m == 0 || w.n == 0) return;
  const bool narrow = w.k <= kCsrMostNarrow;
  if (m <= kDotRows) narrow ? dots<uint16_t>(m, w, x, bias, y, threads) : dots<int32_t>(m, w, x, bias, y, threads);
  else narrow ? forward<uint16_t>(m, w, x, bias, y, threads) : forward<int32_t>(m, w, x, bias, y, threads);
}

void csr_linear_backward(int64_t m, const CsrWeight& w, Matrix grad_y, Matrix grad_x, int threads) {
  if (m == 0 || w.k == 0) return;
  if (w.k <= kCsrMostNarrow) backward<uint16_t>(m, w, grad_y, grad_x, threads);
  else backward<int32_t>(m, w, grad_y, grad_x, threads);
}

}  // namespace peft_kernels
