// The gated activations of SwiGLU and GeGLU blocks on the CPU, forward and backward in one pass each.
#include "cpu_kernels.h"

#define PEFT_KERNELS_BODY "gated_activation.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

constexpr int64_t kRun = 1024;  // elements of a task

// f(row, first column, columns) for runs of at most kRun elements, shared by threads.
template <class Function>
void for_runs(int64_t rows, int64_t columns, int threads, Function f) {
  const int64_t runs = (columns + kRun - 1) / kRun;
  // Starting a thread pays for itself from a few runs on.
  threads = static_cast<int>(std::clamp<int64_t>(rows * columns / (4 * kRun), 1, std::max(threads, 1)));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < rows * runs; ++task) {
    const int64_t first = task % runs * kRun;
    f(task / runs, first, std::min(kRun, columns - first));
  }
}

char* place(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<char*>(matrix.data) + (row * matrix.row_stride + column) * element_size(matrix.dtype);
}

}  // namespace

void gated_forward(int64_t rows, int64_t columns, int activation, Matrix gate, Matrix up, Matrix out, int threads) {
  for_runs(rows, columns, threads, [&](int64_t row, int64_t first, int64_t count) {
    PEFT_KERNELS_DISPATCH(gated_forward_run, activation, gate.dtype, place(gate, row, first), place(up, row, first),
                          place(out, row, first), count);
  });
}

void gated_backward(int64_t rows, int64_t columns, int activation, Matrix grad_h, Matrix gate, Matrix up,
                    Matrix grad_gate, Matrix grad_up, int threads) {
  for_runs(rows, columns, threads, [&](int64_t row, int64_t first, int64_t count) {
    PEFT_KERNELS_DISPATCH(gated_backward_run, activation, gate.dtype, place(grad_h, row, first),
                          place(gate, row, first), place(up, row, first), place(grad_gate, row, first),
                          place(grad_up, row, first), count);
  });
}

}  // namespace peft_kernels
