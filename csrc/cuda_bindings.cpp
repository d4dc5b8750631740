// The Python module peft_kernels._cuda: pointers and streams come as integers; a failed launch raises RuntimeError.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda_bindings.h"
#include "cuda_kernels.h"

namespace py = pybind11;
using namespace peft_kernels;

void bind_bitmap(py::module_& m);
void bind_csr(py::module_& m);
void bind_multi_lora(py::module_& m);
void bind_nf4(py::module_& m);

void check(const char* kernel, int code) {
  if (code == 0) return;
  throw std::runtime_error(std::string(kernel) + ": CUDA error " + std::to_string(code) + ": " + cuda_error_text(code));
}

namespace {

py::dict build_info() {
  py::dict info;
  const int version = cuda_compiler_version();
  info["compiler"] = "nvcc " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["archs"] = PEFT_KERNELS_CUDA_ARCHS;
  return info;
}

void philox_dropout(int device, uintptr_t stream, uintptr_t x, int64_t x_stride, uintptr_t out, int64_t rows,
                    int64_t columns, int64_t row_offset, int dtype, uintptr_t seed, uint32_t threshold, double scale) {
  check("philox_dropout",
        launch_philox_dropout({device, pointer<void>(stream)}, pointer<void>(x), x_stride, pointer<void>(out), rows,
                              columns, row_offset, dtype, pointer<const int64_t>(seed), threshold,
                              static_cast<float>(scale)));
}

void splitk_reduce(int device, uintptr_t stream, uintptr_t partials, int64_t parts, int64_t numel, double scale,
                   uintptr_t out, int dtype) {
  check("splitk_reduce", launch_splitk_reduce({device, pointer<void>(stream)}, pointer<const float>(partials), parts,
                                              numel, static_cast<float>(scale), pointer<void>(out), dtype));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("build_info", &build_info);
  m.def("philox_dropout", &philox_dropout, unlocked);
  m.def("splitk_reduce", &splitk_reduce, unlocked);
  bind_bitmap(m);
  bind_csr(m);
  bind_multi_lora(m);
  bind_nf4(m);
}
