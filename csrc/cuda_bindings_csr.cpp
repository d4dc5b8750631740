// The part of the Python module peft_kernels._cuda that is about pruned weights as kept numbers and their columns.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "csr_linear_cuda.h"
#include "cuda_bindings.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace csr_bindings {

CsrGpu gpu(int device) {
  CsrGpu gpu{};
  check("csr_linear", csr_gpu(device, gpu));
  return gpu;
}

CsrPlan plan(int64_t n, int64_t groups, const CsrGpu& gpu) {
  if (n < 1 || groups < 0 || gpu.multiprocessors < 1)
    throw std::invalid_argument("csr_plan: no such weight, or no GPU to run it");
  return csr_plan(n, groups, gpu);
}

void linear(int device, uintptr_t stream, int64_t n, int64_t k, int64_t groups, int dtype, uintptr_t values,
            uintptr_t columns, uintptr_t starts, const CsrPlan& plan, int m, int rows, uintptr_t x, int64_t x_stride,
            uintptr_t bias, uintptr_t y) {
  const CsrWeight weight{n, k, dtype, pointer<void>(values), pointer<void>(columns), pointer<const int32_t>(starts)};
  const CsrLinear call{groups, m, rows, pointer<void>(x), x_stride, pointer<void>(bias), pointer<void>(y)};
  check("csr_linear", launch_csr_linear({device, pointer<void>(stream)}, weight, call, plan));
}

}  // namespace csr_bindings

void bind_csr(py::module_& m) {
  using namespace csr_bindings;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<CsrGpu>(m, "CsrGpu")
      .def(py::init<int, int>(), py::arg("multiprocessors"), py::arg("shared_bytes"))
      .def_readonly("multiprocessors", &CsrGpu::multiprocessors)
      .def_readonly("shared_bytes", &CsrGpu::shared_bytes);
  py::class_<CsrPlan>(m, "CsrPlan")
      .def_readonly("lanes", &CsrPlan::lanes)
      .def_readonly("parts", &CsrPlan::parts)
      .def_readonly("warps", &CsrPlan::warps)
      .def_readonly("blocks", &CsrPlan::blocks);
  m.def("csr_gpu", &gpu, unlocked);
  m.def("csr_plan", &plan);
  m.def("csr_rows_at_once", &csr_rows_at_once);
  m.def("csr_linear", &linear, unlocked);
}
