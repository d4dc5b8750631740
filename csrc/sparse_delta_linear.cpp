// The sparse half of sparse_delta_linear on the CPU; the product with the weight stays in PyTorch.
//
// 1024 x 4096, 1 % of it chosen, M = 256: 41943 places x 256 rows are 10.7 MFLOP a product of two, 1 % of a dense one, but
// each place takes a column of x and one of dY from anywhere. Blocks of 16 rows turned to [K, 16] and [N, 16] make that a
// cache line each, out of 256 and 64 KiB.
//
// No thread writes where another does, and no sum depends on their number: y and dx are cut by blocks of rows of x, the
// gradients of the values by rows of W, and blocks are added in order.
#include "sparse_delta.h"

#include "buffer.h"

#define PEFT_KERNELS_BODY "sparse_delta_linear.h"
#include "simd/each.h"
#include "turned_rows.h"

namespace peft_kernels {
namespace {

constexpr int64_t kPanelRows = 256;            // rows that are turned at a time
constexpr int64_t kProductsPerThread = 32768;  // starting a thread pays for itself from there on

int useful_threads(const RowDelta& delta, int threads) {
  const int64_t products = delta.nnz * std::min(delta.m, kPanelRows);
  return static_cast<int>(std::clamp<int64_t>(products / kProductsPerThread, 1, std::max(threads, 1)));
}

// Where the places of each row of Δ begin, [n + 1].
template <class Index>
Buffer<int64_t> row_starts(const RowDelta& delta, int64_t n, int64_t k) {
  auto starts = allocate<int64_t>(n + 1);
  const auto* flat = static_cast<const Index*>(delta.flat);
  int64_t place = 0;
  for (int64_t row = 0; row < n; ++row) {
    starts[row] = place;
    for (const int64_t end = (row + 1) * k; place < delta.nnz && flat[place] < end;) ++place;
  }
  starts[n] = place;
  return starts;
}

template <class Index>
void forward(int64_t n, int64_t k, const RowDelta& delta, Matrix x, Matrix y, int threads) {
  const int team = useful_threads(delta, threads);
  const auto starts = row_starts<Index>(delta, n, k);
  const int64_t blocks = (delta.m + kRows - 1) / kRows;
  // Few blocks are shared among threads by rows of Δ, each of which turns the block anew.
  const int64_t parts = blocks < team ? (team + blocks - 1) / blocks : 1;
  const auto cuts = cut_rows(starts.get(), n, parts);
  const auto zeros = zero_floats(padded(k));
  const auto* flat = static_cast<const Index*>(delta.flat);
  const int64_t copies = x.dtype == kFloat32 ? 0 : kRows * padded(k), size = copies + (k + n) * kRows;
  const auto scratch = allocate<float>(team * size);
#pragma omp parallel for schedule(static) num_threads(team)
  for (int worker = 0; worker < team; ++worker) {
    float *copy = scratch.get() + worker * size, *panel = copy + copies, *out = panel + k * kRows;
    for (int64_t task = blocks * parts * worker / team; task < blocks * parts * (worker + 1) / team; ++task) {
      const int64_t first = task / parts * kRows, begin = cuts[task % parts], end = cuts[task % parts + 1];
      BlockRows{delta.rows, delta.m, x, k, zeros.get()}.turn(first, copy, panel);
      PEFT_KERNELS_DISPATCH(delta_forward, flat, delta.values, starts.get(), k, begin, end, panel, out);
      Matrix part = y;
      part.data = static_cast<float*>(y.data) + begin;
      BlockRows{delta.rows, delta.m, part, end - begin, nullptr}.add(first, out + begin * kRows);
    }
  }
}

template <class Index>
void backward(int64_t n, int64_t k, const RowDelta& delta, Matrix grad_y, Matrix x, Matrix grad_x, int threads) {
  const int team = useful_threads(delta, threads);
  const auto starts = row_starts<Index>(delta, n, k);
  const auto cuts = cut_rows(starts.get(), n, team);
  const auto zeros = zero_floats(padded(std::max(n, k)));
  const auto* flat = static_cast<const Index*>(delta.flat);
  const bool need_values = delta.grad_values != nullptr, need_x = grad_x.data != nullptr;
  const int64_t most = std::min((delta.m + kRows - 1) / kRows, kPanelRows / kRows);
  const auto grads = allocate<float>(most * n * kRows), turned = allocate<float>(need_values ? most * k * kRows : 0);
  const int64_t copies = grad_y.dtype == kFloat32 ? 0 : kRows * padded(std::max(n, k));
  const int64_t size = copies + (need_x ? k * kRows : 0);
  const auto scratch = allocate<float>(team * size);
  if (need_values) std::fill_n(delta.grad_values, delta.nnz, 0.0f);
  const BlockRows from_y{delta.rows, delta.m, grad_y, n, zeros.get()}, from_x{delta.rows, delta.m, x, k, zeros.get()};
  const BlockRows to_x{delta.rows, delta.m, grad_x, k, nullptr};
  for (int64_t begin = 0; begin < delta.m; begin += kPanelRows) {
    const int64_t blocks = (std::min(kPanelRows, delta.m - begin) + kRows - 1) / kRows;
#pragma omp parallel num_threads(team)
    {
#pragma omp for schedule(static)
      for (int worker = 0; worker < team; ++worker) {
        float *copy = scratch.get() + worker * size, *panel = copy + copies;
        for (int64_t block = blocks * worker / team; block < blocks * (worker + 1) / team; ++block) {
          const int64_t first = begin + block * kRows;
          float* grad = grads.get() + block * n * kRows;
          from_y.turn(first, copy, grad);
          if (need_values) from_x.turn(first, copy, turned.get() + block * k * kRows);
          if (!need_x) continue;
          std::fill_n(panel, k * kRows, 0.0f);
          PEFT_KERNELS_DISPATCH(delta_grad_x, flat, delta.values, starts.get(), k, int64_t{0}, n, grad, panel);
          to_x.add(first, panel);
        }
      }
#pragma omp for schedule(static)
      for (int worker = 0; worker < team; ++worker)
        for (int64_t block = 0; block < blocks && need_values; ++block)
          PEFT_KERNELS_DISPATCH(delta_grad_values, flat, starts.get(), k, cuts[worker], cuts[worker + 1],
                                grads.get() + block * n * kRows, turned.get() + block * k * kRows, delta.grad_values);
    }
  }
}

}  // namespace

void sparse_delta_forward(int64_t n, int64_t k, const std::vector<RowDelta>& deltas, Matrix x, Matrix y, int threads) {
  for (const RowDelta& delta : deltas) {
    if (delta.nnz == 0 || delta.m == 0) continue;
    delta.wide ? forward<int64_t>(n, k, delta, x, y, threads) : forward<int32_t>(n, k, delta, x, y, threads);
  }
}

void sparse_delta_backward(int64_t n, int64_t k, const std::vector<RowDelta>& deltas, Matrix grad_y, Matrix x,
                           Matrix grad_x, int threads) {
  for (const RowDelta& delta : deltas) {
    if (delta.m == 0 && delta.grad_values != nullptr) std::fill_n(delta.grad_values, delta.nnz, 0.0f);
    if (delta.nnz == 0 || delta.m == 0) continue;
    delta.wide ? backward<int64_t>(n, k, delta, grad_y, x, grad_x, threads)
               : backward<int32_t>(n, k, delta, grad_y, x, grad_x, threads);
  }
}

}  // namespace peft_kernels
