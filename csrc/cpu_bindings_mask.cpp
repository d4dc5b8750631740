// The part of the Python module peft_kernels._cpu that is about masks.
#include <pybind11/pybind11.h>

#include "cpu_kernels.h"
#include "numeric.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

MaskWords mask(uintptr_t words, int64_t stride) { return {pointer<const uint32_t>(words), stride}; }

void pack(int64_t n, int64_t k, int dtype, uintptr_t values, int64_t stride, uintptr_t threshold,
          int64_t threshold_stride, bool magnitude, uintptr_t words, int threads) {
  mask_pack(n, k, {pointer<void>(values), stride, dtype}, pointer<const float>(threshold), threshold_stride, magnitude,
            pointer<uint32_t>(words), threads);
}

void unpack(int64_t n, int64_t k, uintptr_t words, int64_t words_stride, uintptr_t out, int threads) {
  mask_unpack(n, k, mask(words, words_stride), pointer<uint8_t>(out), threads);
}

void apply(int64_t n, int64_t k, int dtype, uintptr_t weight, int64_t stride, uintptr_t words, int64_t words_stride,
           int out_dtype, uintptr_t out, int64_t out_stride, int threads) {
  mask_apply(n, k, {pointer<void>(weight), stride, dtype}, mask(words, words_stride),
             {pointer<void>(out), out_stride, out_dtype}, threads);
}

}  // namespace

void bind_mask(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("mask_pack", &pack, unlocked);
  m.def("mask_unpack", &unpack, unlocked);
  m.def("mask_apply", &apply, unlocked);
}
