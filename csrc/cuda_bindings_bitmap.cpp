// The part of the Python module peft_kernels._cuda that is about pruned weights as bits and nonzeros.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "bitmap_linear.h"
#include "cuda_bindings.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace bitmap_bindings {

// The weight's shape and numbers, without its tensors.
BitmapWeight shape(int64_t n, int64_t k, int panels, int most_slots) {
  return {n, k, panels, most_slots, nullptr, nullptr, nullptr, nullptr};
}

BitmapGpu gpu(int device) {
  BitmapGpu gpu{};
  check("bitmap_linear", bitmap_gpu(device, gpu));
  return gpu;
}

BitmapPlan plan(int64_t n, int64_t k, int panels, int most_slots, const BitmapGpu& gpu) {
  const BitmapWeight weight = shape(n, k, panels, most_slots);
  if (!bitmap_fits(weight) || gpu.multiprocessors < 1)
    throw std::invalid_argument("bitmap_plan: no such weight, or no GPU to run it");
  return bitmap_plan(weight, gpu);
}

void linear(int device, uintptr_t stream, int64_t n, int64_t k, int panels, int most_slots, uintptr_t values,
            uintptr_t bits, uintptr_t starts, uintptr_t order, const BitmapPlan& plan, int m, int dtype, uintptr_t x,
            int64_t x_stride, uintptr_t bias, uintptr_t y) {
  BitmapWeight weight = shape(n, k, panels, most_slots);
  weight.values = pointer<void>(values);
  weight.bits = pointer<void>(bits);
  weight.starts = pointer<const int32_t>(starts);
  weight.order = pointer<const int32_t>(order);
  const BitmapLinear call{m, pointer<void>(x), x_stride, pointer<void>(bias), pointer<void>(y)};
  check("bitmap_linear", launch_bitmap_linear({device, pointer<void>(stream)}, weight, dtype, call, plan));
}

}  // namespace bitmap_bindings

void bind_bitmap(py::module_& m) {
  using namespace bitmap_bindings;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<BitmapGpu>(m, "BitmapGpu")
      .def(py::init<int, int, bool>(), py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("clusters"))
      .def_readonly("multiprocessors", &BitmapGpu::multiprocessors)
      .def_readonly("shared_bytes", &BitmapGpu::shared_bytes)
      .def_readonly("clusters", &BitmapGpu::clusters);
  py::class_<BitmapPlan>(m, "BitmapPlan")
      .def_readonly("width", &BitmapPlan::width)
      .def_readonly("groups", &BitmapPlan::groups)
      .def_readonly("splits", &BitmapPlan::splits)
      .def_readonly("tiles", &BitmapPlan::tiles)
      .def_readonly("threads", &BitmapPlan::threads)
      .def_readonly("shared_bytes", &BitmapPlan::shared_bytes);
  m.def("bitmap_gpu", &gpu, unlocked);
  m.def("bitmap_plan", &plan);
  m.def("bitmap_linear", &linear, unlocked);
}
