// The part of the Python module peft_kernels._cpu that is about weights in NF4.
#include <pybind11/pybind11.h>

#include "cpu_kernels.h"
#include "numeric.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace nf4_bindings {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// n, k, row stride, first element, blocksize; the weight's five tensors, null where there is none.
Nf4Weight weight(int64_t n, int64_t k, int64_t row_stride, int64_t first, int64_t blocksize, uintptr_t packed,
                 uintptr_t absmax, uintptr_t nested_absmax, uintptr_t nested_map, uintptr_t nested_offset) {
  return {n, k, row_stride, first, __builtin_ctzll(static_cast<uint64_t>(blocksize)), pointer<const uint8_t>(packed),
          pointer<const void>(absmax), pointer<const float>(nested_absmax), pointer<const float>(nested_map),
          pointer<const float>(nested_offset)};
}

#define PEFT_KERNELS_NF4_PARAMETERS                                                                          \
  int64_t n, int64_t k, int64_t row_stride, int64_t first, int64_t blocksize, uintptr_t packed, uintptr_t absmax, \
      uintptr_t nested_absmax, uintptr_t nested_map, uintptr_t nested_offset
#define PEFT_KERNELS_NF4_WEIGHT \
  weight(n, k, row_stride, first, blocksize, packed, absmax, nested_absmax, nested_map, nested_offset)

void dequantize(PEFT_KERNELS_NF4_PARAMETERS, int dtype, uintptr_t out, int threads) {
  nf4_dequantize(PEFT_KERNELS_NF4_WEIGHT, {pointer<void>(out), k, dtype}, threads);
}

void quantize(uintptr_t values, int dtype, int64_t count, int64_t blocksize, uintptr_t packed, uintptr_t absmax,
              int threads) {
  nf4_quantize(pointer<const void>(values), dtype, count, blocksize, pointer<uint8_t>(packed), pointer<float>(absmax),
               threads);
}

void linear_forward(PEFT_KERNELS_NF4_PARAMETERS, int64_t m, int dtype, uintptr_t x, int64_t x_stride, uintptr_t bias,
                    uintptr_t y, int threads) {
  nf4_linear_forward(m, PEFT_KERNELS_NF4_WEIGHT, {pointer<void>(x), x_stride, dtype}, {pointer<void>(bias), n, dtype},
                     {pointer<void>(y), n, dtype}, threads);
}

void linear_backward(PEFT_KERNELS_NF4_PARAMETERS, int64_t m, int dtype, uintptr_t grad_y, int64_t grad_stride,
                     uintptr_t grad_x, int threads) {
  nf4_linear_backward(m, PEFT_KERNELS_NF4_WEIGHT, {pointer<void>(grad_y), grad_stride, dtype},
                      {pointer<void>(grad_x), k, dtype}, threads);
}

}  // namespace nf4_bindings

void bind_nf4(py::module_& m) {
  using namespace nf4_bindings;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("nf4_dequantize", &dequantize, unlocked);
  m.def("nf4_quantize", &quantize, unlocked);
  m.def("nf4_linear_forward", &linear_forward, unlocked);
  m.def("nf4_linear_backward", &linear_backward, unlocked);
}
