// What the CPU extension offers: plain C++ over raw pointers, no torch. Strides and sizes count elements.
#pragma once

#include <cstdint>
#include <vector>

#include "mask.h"
#include "nf4.h"

namespace peft_kernels {

// Dropout's parameters: `seed` points to the 64-bit seed, or is null for no dropout. See philox.h.
struct Dropout {
  const int64_t* seed;
  uint32_t threshold;
  double scale;
};

// A matrix whose columns are adjacent in memory; `data` null where there is none.
struct Matrix {
  void* data;
  int64_t row_stride;
  int dtype;
};

// out [rows, columns], contiguous = drop(x); x's row m has the counters of row m + row_offset.
void philox_dropout(Matrix x, void* out, int64_t rows, int64_t columns, int64_t row_offset, Dropout dropout,
                    int threads);

// One adapter of a group: it adds to output `output`, and its products begin at `column` of s. A [r, K] and B [N, r] in
// one dtype, as are their gradients.
struct Adapter {
  int64_t r, output, column;
  Matrix lora_A, lora_B;
  double scaling;
  Dropout dropout;
  Matrix grad_A, grad_B;
};

// One output that has adapters: y [M, N] in forward, dY in backward.
struct Output {
  int64_t n;
  Matrix y;
};

// The low-rank half of lora_linear_group over M rows of x [M, K]. `adapters` ascend by output; s [M, ranks] holds
// their products drop(x) Aᵀ. Where token_mask [M] is given and 0, the row's products are zero.
struct Group {
  int64_t m, k;
  Matrix x, s;
  const uint8_t* token_mask;
  std::vector<Adapter> adapters;
  std::vector<Output> outputs;
};

// s = drop(x) Aᵀ, y += sum of scaling s Bᵀ over the output's adapters, in one pass over x and each y.
void lora_group_forward(const Group& group, int threads);

// With dS = scaling dY B: grad_x += sum of drop(dS A), grad_A = dSᵀ drop(x), grad_B = scaling dYᵀ s, in one pass over
// each of dY, x and grad_x. A gradient whose data is null is not computed, nor is its input read.
void lora_group_backward(const Group& group, Matrix grad_x, int threads);

// The low-rank half of multi_lora_linear: every one of M rows of x [M, K] chooses `choices` adapters by `ids`
// [M, choices], none where an id is outside [0, adapters), each with a weight in `mix` (null: 1). `table` [adapters,
// layers, 4 words] says where their factors are: formats/adapter_table.py.
struct MultiBatch {
  int64_t m, k, choices;
  Matrix x;
  const int64_t* ids;
  const float* mix;
  const int64_t* table;
  int64_t adapters, layers;
  int adapter_dtype;
  std::vector<Dropout> dropouts;  // of each adapter, without seeds; empty where nothing is dropped
};

// The layer of the table; y [M, N] in forward, dY in backward; s [M, choices, width] (null: not kept); the mask's seed.
struct MultiProjection {
  int64_t layer, n, width;
  Matrix y;
  void* s;
  const int64_t* seed;
};

// Gradients of an adapter in a projection, contiguous, null where not wanted.
struct MultiGradient {
  int64_t projection, adapter;
  void *grad_A, *grad_B;
};

// y_j[m] += sum of mix scaling s_j[m, i] Bᵀ over the row's choices, s_j[m, i] = drop_j(x)[m] Aᵀ.
void multi_lora_forward(const MultiBatch& batch, const std::vector<MultiProjection>& projections, int threads);

// grad_x [M, K] += ..., grad_mix [M, choices] += ..., and the gradients of adapters, zeros where no row chose one.
void multi_lora_backward(const MultiBatch& batch, const std::vector<MultiProjection>& projections, Matrix grad_x,
                         float* grad_mix, const std::vector<MultiGradient>& grads, int threads);

// A whole lora_linear: y = x Wᵀ + bias + scaling s Bᵀ with s = drop(x) Aᵀ, on one thread.
struct LoraSizes {
  int64_t m, n, k, r;
};

struct SmallLayer {
  LoraSizes sizes;
  Matrix x, weight, bias, y, s, lora_A, lora_B;  // in backward y is dY
  double scaling;
  Dropout dropout;
};

struct SmallGradients {
  Matrix x, lora_A, lora_B;  // `data` null where not wanted
};

void lora_small_forward(const SmallLayer& layer);
void lora_small_backward(const SmallLayer& layer, const SmallGradients& grads);

// The values are part of the binding: kernels/cpu/gated_activation.py maps names to them.
enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// out = act(gate) * up; grad_gate = grad_h * up * act'(gate), grad_up = grad_h * act(gate). All [rows, columns] in one
// dtype.
void gated_forward(int64_t rows, int64_t columns, int activation, Matrix gate, Matrix up, Matrix out, int threads);
void gated_backward(int64_t rows, int64_t columns, int activation, Matrix grad_h, Matrix gate, Matrix up,
                    Matrix grad_gate, Matrix grad_up, int threads);


// y [rows, columns] = u * g + bias, with g and bias (or null) [columns].
void dora_scale(int64_t rows, int64_t columns, Matrix u, const float* g, const float* bias, Matrix y, int threads);

// grad_u = grad_y * g, products [columns] = sum over rows of grad_y * u, sums [columns] = sum over rows of grad_y, in one
// pass. grad_u, and u with products, and sums may be null.
void dora_backward(int64_t rows, int64_t columns, Matrix grad_y, Matrix u, const float* g, Matrix grad_u,
                   float* products, float* sums, int threads);

// out [n, k] = the weight, rounded once to out's dtype.
void nf4_dequantize(const Nf4Weight& w, Matrix out, int threads);

// The indices of `count` contiguous values in blocks of `blocksize`, two to a byte, and the blocks' absmax.
void nf4_quantize(const void* values, int dtype, int64_t count, int64_t blocksize, uint8_t* packed, float* absmax,
                  int threads);

// y [M, N] = x Wᵀ + bias (or none); grad_x [M, K] = grad_y W. W is rounded to the dtype of x.
void nf4_linear_forward(int64_t m, const Nf4Weight& w, Matrix x, Matrix bias, Matrix y, int threads);
void nf4_linear_backward(int64_t m, const Nf4Weight& w, Matrix grad_y, Matrix grad_x, int threads);

// words [n, ceil(k / 32)], contiguous: of the values that are not 0, or with `threshold` (one, or at a stride of 1 one a
// row) of those above it, by magnitude if asked. `values` may be of kByte.
void mask_pack(int64_t n, int64_t k, Matrix values, const float* threshold, int64_t threshold_stride, bool magnitude,
               uint32_t* words, int threads);

// out [n, k], contiguous: bytes of 0 and 1.
void mask_unpack(int64_t n, int64_t k, MaskWords words, uint8_t* out, int threads);

// out [n, k] = the kept weights, rounded to out's dtype, and 0; out may be the weight. float64 becomes nothing else.
void mask_apply(int64_t n, int64_t k, Matrix weight, MaskWords words, Matrix out, int threads);

// Chosen weights: flat [count] int32 or (wide) int64, ascending, of which those of rows [strip i, strip (i + 1)) are
// starts[i] to starts[i + 1]; what is added there, or where their gradients go, is `values`.
struct MaskedPlaces {
  const void* flat;
  bool wide;
  const int64_t* starts;
  int64_t strip;
  void* values;
  int dtype;
};

// W [n, k], dense or (dense.data null) NF4 or (that null too) zeros, and which weights are kept (words.data null: all).
// With r > 0 it stands for W + scaling B A, of which the mask then keeps a part; with changes.flat for W + Δ, whose
// values are floats.
struct MaskedOperand {
  int64_t n, k;
  Matrix dense;
  Nf4Weight nf4;
  MaskWords words;
  int64_t r;
  Matrix lora_A, lora_B;
  double scaling;
  MaskedPlaces changes;
};

// y [M, N] = x (W ⊙ mask)ᵀ + bias (or none); grad_x [M, K] = grad_y (W ⊙ mask). W is rounded to the dtype of x.
void masked_linear_forward(int64_t m, const MaskedOperand& w, Matrix x, Matrix bias, Matrix y, int threads);
void masked_linear_grad_x(int64_t m, const MaskedOperand& w, Matrix grad_y, Matrix grad_x, int threads);

// grad_weight [N, K] = grad_yᵀ x where the mask keeps it, else 0; or the same at chosen places.
void masked_linear_grad_weight(int64_t m, int64_t n, int64_t k, Matrix grad_y, Matrix x, MaskWords words,
                               Matrix grad_weight, int threads);
void masked_linear_grad_values(int64_t m, int64_t n, int64_t k, Matrix grad_y, Matrix x, const MaskedPlaces& places,
                               int threads);

// A block-sparse matrix [n, k]: formats/_block.py says what the tensors are. values [blocks * block, block].
struct BlockMatrix {
  int64_t n, k, block, blocks;
  Matrix values;
  const int32_t *row_starts, *columns, *column_starts, *rows, *order, *long_rows, *long_columns;
};

// y [M, N] = x Wᵀ + bias (or none); grad_x [M, K] = grad_y W; grad [blocks * block, block], contiguous = the kept blocks
// of grad_yᵀ x, 0 beyond the matrix. All in the dtype of W.
void block_linear_forward(int64_t m, const BlockMatrix& w, Matrix x, Matrix bias, Matrix y, int threads);
void block_linear_backward(int64_t m, const BlockMatrix& w, Matrix grad_y, Matrix grad_x, int threads);
void block_linear_gradient(int64_t m, const BlockMatrix& w, Matrix grad_y, Matrix x, Matrix grad, int threads);

}  // namespace peft_kernels
