// The part of the Python module peft_kernels._cpu that is about many adapters.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "cpu_kernels.h"
#include "numeric.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace multi_lora_bindings {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Layer of the table, N, width of s; y or dY, its row stride; s; seed.
using ProjectionTuple = std::tuple<int64_t, int64_t, int64_t, uintptr_t, int64_t, uintptr_t, uintptr_t>;
using DropoutTuple = std::tuple<uint32_t, double>;                             // threshold, scale
using GradientTuple = std::tuple<int64_t, int64_t, uintptr_t, uintptr_t>;  // projection, adapter, dA, dB

#define PEFT_KERNELS_BATCH_PARAMETERS                                                                                \
  int64_t m, int64_t k, int dtype, uintptr_t x, int64_t x_stride, uintptr_t ids, int64_t choices, uintptr_t mix,     \
      uintptr_t table, int64_t adapters, int64_t layers, int adapter_dtype, const std::vector<DropoutTuple>& dropouts, \
      const std::vector<ProjectionTuple>& projections
#define PEFT_KERNELS_BATCH \
  batch(m, k, dtype, x, x_stride, ids, choices, mix, table, adapters, layers, adapter_dtype, dropouts)

MultiBatch batch(int64_t m, int64_t k, int dtype, uintptr_t x, int64_t x_stride, uintptr_t ids, int64_t choices,
                 uintptr_t mix, uintptr_t table, int64_t adapters, int64_t layers, int adapter_dtype,
                 const std::vector<DropoutTuple>& dropouts) {
  MultiBatch made{m, k, choices, {pointer<void>(x), x_stride, dtype}, pointer<const int64_t>(ids),
                  pointer<const float>(mix), pointer<const int64_t>(table), adapters, layers, adapter_dtype, {}};
  for (const auto& [threshold, scale] : dropouts) made.dropouts.push_back({nullptr, threshold, scale});
  return made;
}

std::vector<MultiProjection> made(const std::vector<ProjectionTuple>& projections, int dtype) {
  std::vector<MultiProjection> all;
  for (const auto& [layer, n, width, y, y_stride, s, seed] : projections)
    all.push_back({layer, n, width, {pointer<void>(y), y_stride, dtype}, pointer<void>(s), pointer<const int64_t>(seed)});
  return all;
}

void forward(PEFT_KERNELS_BATCH_PARAMETERS, int threads) {
  multi_lora_forward(PEFT_KERNELS_BATCH, made(projections, dtype), threads);
}

void backward(PEFT_KERNELS_BATCH_PARAMETERS, uintptr_t grad_x, uintptr_t grad_mix,
              const std::vector<GradientTuple>& grads, int threads) {
  std::vector<MultiGradient> wanted;
  for (const auto& [projection, adapter, grad_A, grad_B] : grads)
    wanted.push_back({projection, adapter, pointer<void>(grad_A), pointer<void>(grad_B)});
  multi_lora_backward(PEFT_KERNELS_BATCH, made(projections, dtype), {pointer<void>(grad_x), k, dtype},
                      pointer<float>(grad_mix), wanted, threads);
}

}  // namespace multi_lora_bindings

void bind_multi_lora(py::module_& m) {
  using namespace multi_lora_bindings;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("multi_lora_forward", &forward, unlocked);
  m.def("multi_lora_backward", &backward, unlocked);
}
