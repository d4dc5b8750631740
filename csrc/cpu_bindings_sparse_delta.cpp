// The part of the Python module peft_kernels._cpu that is about changes of chosen weights.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "numeric.h"
#include "sparse_delta.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace sparse_delta_bindings {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Places, whether they are int64, how many, values, rows, how many, gradient; 0 for none.
using DeltaTuple = std::tuple<uintptr_t, bool, int64_t, uintptr_t, uintptr_t, int64_t, uintptr_t>;

std::vector<RowDelta> made(const std::vector<DeltaTuple>& deltas) {
  std::vector<RowDelta> all;
  for (const auto& [flat, wide, nnz, values, rows, m, grad] : deltas)
    all.push_back({pointer<const void>(flat), wide, nnz, pointer<const float>(values), pointer<const int64_t>(rows), m,
                   pointer<float>(grad)});
  return all;
}

void forward(int64_t n, int64_t k, const std::vector<DeltaTuple>& deltas, uintptr_t x, int64_t x_stride, uintptr_t y,
             int threads) {
  sparse_delta_forward(n, k, made(deltas), {pointer<void>(x), x_stride, kFloat32}, {pointer<void>(y), n, kFloat32},
                       threads);
}

void backward(int64_t n, int64_t k, const std::vector<DeltaTuple>& deltas, int dtype, uintptr_t grad_y,
              int64_t grad_stride, uintptr_t x, int64_t x_stride, uintptr_t grad_x, int threads) {
  sparse_delta_backward(n, k, made(deltas), {pointer<void>(grad_y), grad_stride, dtype},
                        {pointer<void>(x), x_stride, dtype}, {pointer<void>(grad_x), k, kFloat32}, threads);
}

}  // namespace sparse_delta_bindings

void bind_sparse_delta(py::module_& m) {
  using namespace sparse_delta_bindings;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("sparse_delta_forward", &forward, unlocked);
  m.def("sparse_delta_backward", &backward, unlocked);
}
