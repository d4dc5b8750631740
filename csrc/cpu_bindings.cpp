// The Python module peft_kernels._cpu: pointers come as integers, sizes and strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_kernels.h"
#include "isa.h"
#include "numeric.h"
#include "philox.h"

namespace py = pybind11;
using namespace peft_kernels;

void bind_nf4(py::module_& m);         // cpu_bindings_nf4.cpp
void bind_multi_lora(py::module_& m);  // cpu_bindings_multi_lora.cpp
void bind_mask(py::module_& m);        // cpu_bindings_mask.cpp
void bind_block(py::module_& m);       // cpu_bindings_block.cpp
void bind_csr(py::module_& m);         // cpu_bindings_csr.cpp
void bind_sparse_delta(py::module_& m);  // cpu_bindings_sparse_delta.cpp

namespace peft_kernels {

namespace {
int isa_in_force = -1;
}

int current_isa() { return isa_in_force; }
void set_isa(int isa) { isa_in_force = isa; }

}  // namespace peft_kernels

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // begins with "Clang"
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

Dropout dropout(uintptr_t seed, uint32_t threshold, double scale) {
  return {static_cast<const int64_t*>(pointer(seed)), threshold, scale};
}

void choose_isa(const std::string& name) {
  for (int isa = kPortable; isa <= kAvx512; ++isa) {
    if (name != kIsaNames[isa]) continue;
    if (!isa_supported(isa)) throw std::invalid_argument("this processor does not run " + name + " code");
    return set_isa(isa);
  }
  throw std::invalid_argument("unknown vector width " + name + "; expected portable, avx2 or avx512");
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  py::list widths;
  for (int isa = kPortable; isa <= kAvx512; ++isa)
    if (isa_supported(isa)) widths.append(kIsaNames[isa]);
  info["vector_widths"] = widths;
  info["vector_width"] = kIsaNames[current_isa()];
  return info;
}

py::tuple philox(int64_t seed, int64_t counter) {
  const PhiloxWords words = philox4x32(static_cast<uint64_t>(seed), static_cast<uint64_t>(counter));
  return py::make_tuple(words.word[0], words.word[1], words.word[2], words.word[3]);
}

// Arguments are plain numbers: pybind11 converts each in about 20 ns, a tuple of them in several hundred.

void philox_dropout_call(uintptr_t x, int64_t x_stride, uintptr_t out, int64_t rows, int64_t columns,
                         int64_t row_offset, int dtype, uintptr_t seed, uint32_t threshold, double scale, int threads) {
  philox_dropout({pointer(x), x_stride, dtype}, pointer(out), rows, columns, row_offset, dropout(seed, threshold, scale),
                 threads);
}

void lora_forward(int64_t m, int64_t n, int64_t k, int64_t r, int dtype, int adapter_dtype, uintptr_t x, int64_t x_stride,
                  uintptr_t y, uintptr_t s, uintptr_t lora_A, int64_t A_stride, uintptr_t lora_B,
                  int64_t B_stride, double scaling, uintptr_t seed, uint32_t threshold, double scale, int threads) {
  const Adapter adapter{r, 0, 0, {pointer(lora_A), A_stride, adapter_dtype}, {pointer(lora_B), B_stride, adapter_dtype},
                        scaling, dropout(seed, threshold, scale), {}, {}};
  const Output output{n, {pointer(y), n, dtype}};
  lora_group_forward({m, k, {pointer(x), x_stride, dtype}, {pointer(s), r, dtype}, nullptr, {adapter}, {output}}, threads);
}

void lora_backward(int64_t m, int64_t n, int64_t k, int64_t r, int dtype, int adapter_dtype, uintptr_t grad_y,
                   int64_t grad_y_stride, uintptr_t x, int64_t x_stride, uintptr_t s, int64_t s_stride,
                   uintptr_t lora_A, int64_t A_stride, uintptr_t lora_B, int64_t B_stride, double scaling,
                   uintptr_t seed, uint32_t threshold, double scale, uintptr_t grad_x, uintptr_t grad_A,
                   uintptr_t grad_B, int threads) {
  const Adapter adapter{r, 0, 0, {pointer(lora_A), A_stride, adapter_dtype}, {pointer(lora_B), B_stride, adapter_dtype},
                        scaling, dropout(seed, threshold, scale), {pointer(grad_A), k, adapter_dtype},
                        {pointer(grad_B), r, adapter_dtype}};
  const Output output{n, {pointer(grad_y), grad_y_stride, dtype}};
  lora_group_backward({m, k, {pointer(x), x_stride, dtype}, {pointer(s), s_stride, dtype}, nullptr, {adapter}, {output}},
                      {pointer(grad_x), k, dtype}, threads);
}

// r, output, column of s, dtype; A, its row stride; B, its row stride; scaling; seed, threshold, scale; grad_A, grad_B.
using AdapterTuple = std::tuple<int64_t, int64_t, int64_t, int, uintptr_t, int64_t, uintptr_t, int64_t, double,
                                uintptr_t, uint32_t, double, uintptr_t, uintptr_t>;
using OutputTuple = std::tuple<int64_t, uintptr_t, int64_t>;  // N; y or dY, its row stride

Group group(int64_t m, int64_t k, int dtype, uintptr_t x, int64_t x_stride, uintptr_t s, int64_t s_stride,
            uintptr_t token_mask, const std::vector<AdapterTuple>& adapters, const std::vector<OutputTuple>& outputs) {
  Group made{m, k, {pointer(x), x_stride, dtype}, {pointer(s), s_stride, dtype},
             static_cast<const uint8_t*>(pointer(token_mask)), {}, {}};
  for (const auto& [r, output, column, adapter_dtype, lora_A, A_stride, lora_B, B_stride, scaling, seed, threshold, scale,
                    grad_A, grad_B] : adapters)
    made.adapters.push_back({r, output, column, {pointer(lora_A), A_stride, adapter_dtype},
                             {pointer(lora_B), B_stride, adapter_dtype}, scaling, dropout(seed, threshold, scale),
                             {pointer(grad_A), k, adapter_dtype}, {pointer(grad_B), r, adapter_dtype}});
  for (const auto& [n, y, stride] : outputs) made.outputs.push_back({n, {pointer(y), stride, dtype}});
  return made;
}

void group_forward(int64_t m, int64_t k, int dtype, uintptr_t x, int64_t x_stride, uintptr_t s, int64_t s_stride,
                   uintptr_t token_mask, const std::vector<AdapterTuple>& adapters,
                   const std::vector<OutputTuple>& outputs, int threads) {
  lora_group_forward(group(m, k, dtype, x, x_stride, s, s_stride, token_mask, adapters, outputs), threads);
}

void group_backward(int64_t m, int64_t k, int dtype, uintptr_t x, int64_t x_stride, uintptr_t s, int64_t s_stride,
                    uintptr_t token_mask, const std::vector<AdapterTuple>& adapters,
                    const std::vector<OutputTuple>& outputs, uintptr_t grad_x, int threads) {
  lora_group_backward(group(m, k, dtype, x, x_stride, s, s_stride, token_mask, adapters, outputs),
                      {pointer(grad_x), k, dtype}, threads);
}

// Every matrix is contiguous.
SmallLayer small_layer(int64_t m, int64_t n, int64_t k, int64_t r, int dtype, int adapter_dtype, uintptr_t x,
                       uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t s, uintptr_t lora_A, uintptr_t lora_B,
                       double scaling, Dropout dropout) {
  return {{m, n, k, r}, {pointer(x), k, dtype}, {pointer(weight), k, dtype}, {pointer(bias), n, dtype},
          {pointer(y), n, dtype}, {pointer(s), r, dtype}, {pointer(lora_A), k, adapter_dtype},
          {pointer(lora_B), r, adapter_dtype}, scaling, dropout};
}

void small_forward(int64_t m, int64_t n, int64_t k, int64_t r, int dtype, int adapter_dtype, uintptr_t x,
                   uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t s, uintptr_t lora_A, uintptr_t lora_B,
                   double scaling, uintptr_t seed, uint32_t threshold, double scale) {
  lora_small_forward(small_layer(m, n, k, r, dtype, adapter_dtype, x, weight, bias, y, s, lora_A, lora_B, scaling,
                                 dropout(seed, threshold, scale)));
}

void small_backward(int64_t m, int64_t n, int64_t k, int64_t r, int dtype, int adapter_dtype, uintptr_t grad_y,
                    uintptr_t x, uintptr_t s, uintptr_t weight, uintptr_t lora_A, uintptr_t lora_B, double scaling,
                    uintptr_t seed, uint32_t threshold, double scale, uintptr_t grad_x, uintptr_t grad_A,
                    uintptr_t grad_B) {
  lora_small_backward(small_layer(m, n, k, r, dtype, adapter_dtype, x, weight, 0, grad_y, s, lora_A, lora_B, scaling,
                                  dropout(seed, threshold, scale)),
                      {{pointer(grad_x), k, dtype}, {pointer(grad_A), k, adapter_dtype},
                       {pointer(grad_B), r, adapter_dtype}});
}

void gated_forward_call(int64_t rows, int64_t columns, int dtype, int activation, uintptr_t gate, int64_t gate_stride,
                        uintptr_t up, int64_t up_stride, uintptr_t out, int threads) {
  gated_forward(rows, columns, activation, {pointer(gate), gate_stride, dtype}, {pointer(up), up_stride, dtype},
                {pointer(out), columns, dtype}, threads);
}

void gated_backward_call(int64_t rows, int64_t columns, int dtype, int activation, uintptr_t grad_h, int64_t grad_stride,
                         uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, uintptr_t grad_gate,
                         uintptr_t grad_up, int threads) {
  gated_backward(rows, columns, activation, {pointer(grad_h), grad_stride, dtype}, {pointer(gate), gate_stride, dtype},
                 {pointer(up), up_stride, dtype}, {pointer(grad_gate), columns, dtype},
                 {pointer(grad_up), columns, dtype}, threads);
}

void dora_scale_call(int64_t rows, int64_t columns, int dtype, uintptr_t u, uintptr_t g, uintptr_t bias, uintptr_t y,
                     int threads) {
  dora_scale(rows, columns, {pointer(u), columns, dtype}, static_cast<const float*>(pointer(g)),
             static_cast<const float*>(pointer(bias)), {pointer(y), columns, dtype}, threads);
}

void dora_backward_call(int64_t rows, int64_t columns, int dtype, uintptr_t grad_y, int64_t grad_stride, uintptr_t u,
                        int64_t u_stride, uintptr_t g, uintptr_t grad_u, uintptr_t products, uintptr_t sums,
                        int threads) {
  dora_backward(rows, columns, {pointer(grad_y), grad_stride, dtype}, {pointer(u), u_stride, dtype},
                static_cast<const float*>(pointer(g)), {pointer(grad_u), columns, dtype},
                static_cast<float*>(pointer(products)), static_cast<float*>(pointer(sums)), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  set_isa(widest_isa());
  m.def("build_info", &build_info);
  m.def("set_vector_width", &choose_isa);
  m.def("philox4x32", &philox);
  m.def("bfloat16_from_float", &bfloat16_from_float);
  m.def("float16_from_float", &float16_from_float);
  m.def("float_from_float16", &float_from_float16);
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("philox_dropout", &philox_dropout_call, unlocked);
  m.def("lora_forward", &lora_forward, unlocked);
  m.def("lora_backward", &lora_backward, unlocked);
  m.def("lora_group_forward", &group_forward, unlocked);
  m.def("lora_group_backward", &group_backward, unlocked);
  m.def("dora_scale", &dora_scale_call, unlocked);
  m.def("dora_backward", &dora_backward_call, unlocked);
  m.def("gated_forward", &gated_forward_call, unlocked);
  m.def("gated_backward", &gated_backward_call, unlocked);
  m.def("lora_small_forward", &small_forward);
  m.def("lora_small_backward", &small_backward);
  bind_nf4(m);
  bind_multi_lora(m);
  bind_csr(m);
  bind_sparse_delta(m);
  bind_mask(m);
  bind_block(m);
}
