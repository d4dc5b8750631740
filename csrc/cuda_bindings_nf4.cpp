// The part of the Python module peft_kernels._cuda that is about weights in NF4.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "cuda_bindings.h"
#include "cuda_kernels.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace nf4_bindings {

// n, k, row stride, first element, blocksize; the weight's five tensors, null where there is none.
Nf4Weight weight(int64_t n, int64_t k, int64_t row_stride, int64_t first, int64_t blocksize, uintptr_t packed,
                 uintptr_t absmax, uintptr_t nested_absmax, uintptr_t nested_map, uintptr_t nested_offset) {
  return {n, k, row_stride, first, __builtin_ctzll(static_cast<uint64_t>(blocksize)), pointer<const uint8_t>(packed),
          pointer<const void>(absmax), pointer<const float>(nested_absmax), pointer<const float>(nested_map),
          pointer<const float>(nested_offset)};
}

#define PEFT_KERNELS_NF4_PARAMETERS                                                                               \
  int64_t n, int64_t k, int64_t row_stride, int64_t first, int64_t blocksize, uintptr_t packed, uintptr_t absmax, \
      uintptr_t nested_absmax, uintptr_t nested_map, uintptr_t nested_offset
#define PEFT_KERNELS_NF4_WEIGHT \
  weight(n, k, row_stride, first, blocksize, packed, absmax, nested_absmax, nested_map, nested_offset)

std::array<int, kClusterSizes> clusters(int device) {
  ClustersAtOnce clusters;
  check("nf4_linear", clusters_at_once(device, clusters));
  std::array<int, kClusterSizes> counts;
  for (int i = 0; i < kClusterSizes; ++i) counts[i] = clusters.count[i];
  return counts;
}

Nf4Plan plan(int64_t n, int64_t k, const std::array<int, kClusterSizes>& counts) {
  ClustersAtOnce clusters;
  for (int i = 0; i < kClusterSizes; ++i) clusters.count[i] = counts[i];
  if (n < 1 || k < 1 || counts[0] < 1) throw std::invalid_argument("nf4_plan: nothing to divide, or no GPU to run it");
  return nf4_plan(n, k, clusters);
}

void linear(int device, uintptr_t stream, PEFT_KERNELS_NF4_PARAMETERS, int64_t packed_bytes, const Nf4Plan& plan, int m,
            int dtype, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t y, int r, uintptr_t s, uintptr_t lora_B,
            int64_t lora_B_stride, double scaling) {
  const Nf4Linear call{m, pointer<void>(x), x_stride, pointer<void>(bias), pointer<void>(y), r, pointer<void>(s), r,
                       pointer<void>(lora_B), lora_B_stride, static_cast<float>(scaling)};
  check("nf4_linear", launch_nf4_linear({device, pointer<void>(stream)}, PEFT_KERNELS_NF4_WEIGHT, packed_bytes, dtype,
                                        call, plan));
}

void lora_down(int device, uintptr_t stream, int m, int r, int64_t k, int dtype, uintptr_t x, int64_t x_stride,
               uintptr_t lora_A, int64_t A_stride, uintptr_t s) {
  check("lora_down", launch_lora_down({device, pointer<void>(stream)}, m, r, k, dtype, pointer<void>(x), x_stride,
                                      pointer<void>(lora_A), A_stride, pointer<void>(s)));
}

}  // namespace nf4_bindings

void bind_nf4(py::module_& m) {
  using namespace nf4_bindings;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<Nf4Plan>(m, "Nf4Plan")
      .def_readonly("units", &Nf4Plan::units)
      .def_readonly("groups", &Nf4Plan::groups)
      .def_readonly("splits", &Nf4Plan::splits)
      .def_readonly("steps", &Nf4Plan::steps)
      .def_readonly("steps_per_split", &Nf4Plan::steps_per_split)
      .def_readonly("tiles", &Nf4Plan::tiles)
      .def_readonly("blocks", &Nf4Plan::blocks);
  m.def("nf4_clusters", &clusters, unlocked);
  m.def("nf4_plan", &plan);
  m.def("nf4_linear", &linear, unlocked);
  m.def("lora_down", &lora_down, unlocked);
}
