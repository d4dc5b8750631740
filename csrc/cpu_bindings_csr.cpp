// The part of the Python module peft_kernels._cpu that is about pruned weights as kept numbers and their columns.
#include <pybind11/pybind11.h>

#include "csr_linear.h"
#include "numeric.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace csr_bindings {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

CsrWeight weight(int64_t n, int64_t k, int dtype, uintptr_t values, uintptr_t columns, uintptr_t starts) {
  return {n, k, dtype, pointer<void>(values), pointer<void>(columns), pointer<const int32_t>(starts)};
}

void forward(int64_t n, int64_t k, int dtype, uintptr_t values, uintptr_t columns, uintptr_t starts, int64_t m,
             uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t y, int threads) {
  csr_linear_forward(m, weight(n, k, dtype, values, columns, starts), {pointer<void>(x), x_stride, dtype},
                     {pointer<void>(bias), n, dtype}, {pointer<void>(y), n, dtype}, threads);
}

void backward(int64_t n, int64_t k, int dtype, uintptr_t values, uintptr_t columns, uintptr_t starts, int64_t m,
              uintptr_t grad_y, int64_t grad_stride, uintptr_t grad_x, int threads) {
  csr_linear_backward(m, weight(n, k, dtype, values, columns, starts), {pointer<void>(grad_y), grad_stride, dtype},
                      {pointer<void>(grad_x), k, dtype}, threads);
}

}  // namespace csr_bindings

void bind_csr(py::module_& m) {
  using namespace csr_bindings;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("csr_linear_forward", &forward, unlocked);
  m.def("csr_linear_backward", &backward, unlocked);
}
