// The part of the Python module peft_kernels._cpu that is about block-sparse weights.
#include <pybind11/pybind11.h>

#include "cpu_kernels.h"
#include "numeric.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace block_bindings {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// `indices` are those of a BlockWeight: formats/_block.py.
BlockMatrix matrix(int64_t n, int64_t k, int64_t block, int64_t blocks, int dtype, uintptr_t values, uintptr_t indices) {
  const int64_t r = (n + block - 1) / block, c = (k + block - 1) / block;
  const auto* row_starts = pointer<const int32_t>(indices);
  const int32_t* columns = row_starts + r + 1;
  const int32_t* column_starts = columns + blocks;
  const int32_t* rows = column_starts + c + 1;
  const int32_t* order = rows + blocks;
  const int32_t* long_rows = order + blocks;
  return {n, k, block, blocks, {pointer<void>(values), block, dtype}, row_starts, columns, column_starts, rows, order,
          long_rows, long_rows + r};
}

#define PEFT_KERNELS_BLOCK_PARAMETERS \
  int64_t n, int64_t k, int64_t block, int64_t blocks, int dtype, uintptr_t values, uintptr_t indices
#define PEFT_KERNELS_BLOCK_MATRIX matrix(n, k, block, blocks, dtype, values, indices)

void forward(PEFT_KERNELS_BLOCK_PARAMETERS, int64_t m, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t y,
             int threads) {
  block_linear_forward(m, PEFT_KERNELS_BLOCK_MATRIX, {pointer<void>(x), x_stride, dtype},
                       {pointer<void>(bias), n, dtype}, {pointer<void>(y), n, dtype}, threads);
}

void backward(PEFT_KERNELS_BLOCK_PARAMETERS, int64_t m, uintptr_t grad_y, int64_t grad_stride, uintptr_t grad_x,
              int threads) {
  block_linear_backward(m, PEFT_KERNELS_BLOCK_MATRIX, {pointer<void>(grad_y), grad_stride, dtype},
                        {pointer<void>(grad_x), k, dtype}, threads);
}

void gradient(PEFT_KERNELS_BLOCK_PARAMETERS, int64_t m, uintptr_t grad_y, int64_t grad_stride, uintptr_t x,
              int64_t x_stride, uintptr_t grad, int threads) {
  block_linear_gradient(m, PEFT_KERNELS_BLOCK_MATRIX, {pointer<void>(grad_y), grad_stride, dtype},
                        {pointer<void>(x), x_stride, dtype}, {pointer<void>(grad), block, dtype}, threads);
}

}  // namespace block_bindings

void bind_block(py::module_& m) {
  using namespace block_bindings;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("block_linear_forward", &forward, unlocked);
  m.def("block_linear_backward", &backward, unlocked);
  m.def("block_linear_gradient", &gradient, unlocked);
}
