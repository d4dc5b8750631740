// The part of the Python module peft_kernels._cuda that is about many adapters beside each other.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda_bindings.h"
#include "cuda_kernels.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace multi_lora_bindings {

// Of each projection: y, the layer of the table, rows of B.
using Projections = std::vector<std::tuple<uintptr_t, int, int>>;

void linear(int device, uintptr_t stream, int64_t tokens, int k, int rank, int x_type, int a_type, uintptr_t x,
            int64_t x_stride, int choices, uintptr_t ids, uintptr_t mix, int64_t adapters, int64_t adapter_stride,
            uintptr_t table, const Projections& projections) {
  MultiLora call{tokens, k, choices, static_cast<int>(projections.size()), rank, x_type, a_type,
                 pointer<void>(x), x_stride, pointer<const int64_t>(ids), pointer<const float>(mix),
                 pointer<const int64_t>(table), adapters, adapter_stride, {}};
  if (projections.size() > std::size(call.projection))
    throw std::invalid_argument("multi_lora_linear: too many layers");
  for (std::size_t j = 0; j < projections.size(); ++j)
    call.projection[j] = {pointer<void>(std::get<0>(projections[j])), std::get<1>(projections[j]),
                          std::get<2>(projections[j])};
  check("multi_lora_linear", launch_multi_lora_linear({device, pointer<void>(stream)}, call));
}

}  // namespace multi_lora_bindings

void bind_multi_lora(py::module_& m) {
  using namespace multi_lora_bindings;
  m.def("multi_lora_linear", &linear, py::call_guard<py::gil_scoped_release>());
}
