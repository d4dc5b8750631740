// The part of the Python module peft_kernels._cpu that is about masks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "buffer.h"
#include "cpu_kernels.h"
#include "numeric.h"
#include "select.h"

namespace py = pybind11;
using namespace peft_kernels;

namespace mask_bindings {

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

// Places, whether they are int64, where strips of so many rows begin; values: floats. Places 0: none.
using Changes = std::tuple<uintptr_t, bool, uintptr_t, int64_t, uintptr_t>;
// n, k; the weight's dtype, address and row stride (address 0: the ten numbers of one in NF4); the mask's; changes.
using Weight = std::tuple<int64_t, int64_t, int, uintptr_t, int64_t, std::vector<int64_t>, uintptr_t, int64_t, Changes>;
// Rank (0: no update), dtype, A and B with their row strides, scaling.
using Update = std::tuple<int64_t, int, uintptr_t, int64_t, uintptr_t, int64_t, double>;

MaskedOperand operand(const Weight& weight, const Update& update) {
  const auto& [n, k, dtype, dense, stride, nf4, words, words_stride, changes] = weight;
  const auto& [flat, wide, starts, strip, values] = changes;
  const auto& [r, adapter_dtype, lora_A, A_stride, lora_B, B_stride, scaling] = update;
  MaskedOperand made{n, k, {pointer<void>(dense), stride, dtype}, {}, mask(words, words_stride), r,
                     {pointer<void>(lora_A), A_stride, adapter_dtype}, {pointer<void>(lora_B), B_stride, adapter_dtype},
                     scaling, {pointer<const void>(flat), wide, pointer<const int64_t>(starts), strip,
                     pointer<void>(values), kFloat32}};
  if (!nf4.empty())
    made.nf4 = {nf4.at(0), nf4.at(1), nf4.at(2), nf4.at(3), __builtin_ctzll(static_cast<uint64_t>(nf4.at(4))),
                pointer<const uint8_t>(nf4.at(5)), pointer<const void>(nf4.at(6)), pointer<const float>(nf4.at(7)),
                pointer<const float>(nf4.at(8)), pointer<const float>(nf4.at(9))};
  return made;
}

void linear_forward(int64_t m, const Weight& weight, const Update& update, int dtype, uintptr_t x, int64_t x_stride,
                    uintptr_t bias, uintptr_t y, int threads) {
  const MaskedOperand w = operand(weight, update);
  masked_linear_forward(m, w, {pointer<void>(x), x_stride, dtype}, {pointer<void>(bias), w.n, dtype},
                        {pointer<void>(y), w.n, dtype}, threads);
}

void linear_grad_x(int64_t m, const Weight& weight, const Update& update, int dtype, uintptr_t grad_y,
                   int64_t grad_stride, uintptr_t grad_x, int threads) {
  const MaskedOperand w = operand(weight, update);
  masked_linear_grad_x(m, w, {pointer<void>(grad_y), grad_stride, dtype}, {pointer<void>(grad_x), w.k, dtype}, threads);
}

void linear_grad_weight(int64_t m, int64_t n, int64_t k, int dtype, uintptr_t grad_y, int64_t grad_stride, uintptr_t x,
                        int64_t x_stride, uintptr_t words, int64_t words_stride, int out_dtype, uintptr_t out,
                        int threads) {
  masked_linear_grad_weight(m, n, k, {pointer<void>(grad_y), grad_stride, dtype}, {pointer<void>(x), x_stride, dtype},
                            mask(words, words_stride), {pointer<void>(out), k, out_dtype}, threads);
}

void linear_grad_values(int64_t m, int64_t n, int64_t k, int dtype, uintptr_t grad_y, int64_t grad_stride, uintptr_t x,
                        int64_t x_stride, uintptr_t flat, bool wide, uintptr_t starts, int64_t strip, int out_dtype,
                        uintptr_t values, int threads) {
  masked_linear_grad_values(
      m, n, k, {pointer<void>(grad_y), grad_stride, dtype}, {pointer<void>(x), x_stride, dtype},
      {pointer<const void>(flat), wide, pointer<const int64_t>(starts), strip, pointer<void>(values), out_dtype},
      threads);
}

void count(uintptr_t data, int64_t size, int top, int low, int32_t prefix, uintptr_t counts, int threads) {
  select_count(pointer<const float>(data), size, top, low, prefix, pointer<int64_t>(counts), threads);
}

int64_t keep(uintptr_t data, int64_t rows, int64_t columns, int32_t last, int64_t wanted, uintptr_t words, int threads) {
  return select_keep(pointer<const float>(data), rows, columns, last, wanted, pointer<uint32_t>(words), threads);
}

void advise(uintptr_t data, int64_t bytes) { advise_huge_pages(pointer<void>(data), bytes); }

}  // namespace mask_bindings

void bind_mask(py::module_& m) {
  using namespace mask_bindings;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("advise_huge_pages", &advise);
  m.def("select_count", &count, unlocked);
  m.def("select_keep", &keep, unlocked);
  m.def("mask_pack", &pack, unlocked);
  m.def("mask_unpack", &unpack, unlocked);
  m.def("mask_apply", &apply, unlocked);
  m.def("masked_linear_forward", &linear_forward, unlocked);
  m.def("masked_linear_grad_x", &linear_grad_x, unlocked);
  m.def("masked_linear_grad_weight", &linear_grad_weight, unlocked);
  m.def("masked_linear_grad_values", &linear_grad_values, unlocked);
}
