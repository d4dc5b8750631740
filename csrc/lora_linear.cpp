// The low-rank half of lora_linear on the CPU, around the base GEMM that stays in PyTorch (MKL, oneDNN).
//
// Sums over rows (dA, dB) belong to one task for each block of columns, or to a few, one for each part of the rows, whose
// shares are added in order. The number of parts depends on the sizes alone, so the bits do not depend on the number of
// threads. Giving each thread rows and a dA and dB of its own would read dY once instead of twice, but cost more in fresh
// memory than that saves.
#include "cpu_kernels.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "numeric.h"

namespace peft_kernels {

constexpr int kTileRows = 32, kTileColumns = 128, kMaxRank = 512;
constexpr int kTileStride = kTileColumns + 16;  // no power of two: rows must not fall into one set of the L1 cache
constexpr int64_t kPackStep = 64;            // weight rows or columns packed by one task; a multiple of every panel
constexpr int64_t kTasks = 32;               // column blocks are split by rows until there are so many tasks

struct LoraForward {
  LoraSizes sizes;
  Matrix x, y, s;
  const float *packed_A, *packed_B;
  double scaling;
  Dropout dropout;
};

struct LoraBackward {
  LoraSizes sizes;
  Matrix grad_y, x, s;
  const float *packed_A, *packed_B;
  double scaling;
  Dropout dropout;
  Matrix grad_x;
  float *s_floats, *grad_s;  // [M, r rounded up]; null where no wanted gradient needs them
};

// Elements (i, j) of a matrix given by two strides, as float.
struct Weights {
  const void* data;
  int64_t stride_i, stride_j;
  int dtype;
};

inline float element(const Weights& w, int64_t i, int64_t j) {
  const int64_t at = i * w.stride_i + j * w.stride_j;
  if (w.dtype == kFloat32) return static_cast<const float*>(w.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(w.data)[at];
  return w.dtype == kBFloat16 ? float_from_bfloat16(bits) : float_from_float16(bits);
}

// Buffers of one thread.
struct Scratch {
  alignas(64) float tile[kTileRows * kTileStride];
  alignas(64) int16_t masks[kTileRows * kTileColumns];
  alignas(64) float s[kTileRows * kMaxRank];
};

inline void store_element(float value, void* target, int dtype) {
  if (dtype == kFloat32) *static_cast<float*>(target) = value;
  else *static_cast<uint16_t*>(target) = dtype == kBFloat16 ? bfloat16_from_float(value) : float16_from_float(value);
}

}  // namespace peft_kernels

#define PEFT_KERNELS_BODY "lora_linear.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Uninitialised, aligned to a cache line. Allocated before a parallel region: nothing may throw inside one.
template <class T>
Buffer<T> allocate(int64_t count) {
  const int64_t bytes = std::max<int64_t>(1, count) * static_cast<int64_t>(sizeof(T));
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

int64_t steps(int64_t total, int64_t step) { return (total + step - 1) / step; }

Weights by_rows(const Matrix& matrix) { return {matrix.data, matrix.row_stride, 1, matrix.dtype}; }
Weights by_columns(const Matrix& matrix) { return {matrix.data, 1, matrix.row_stride, matrix.dtype}; }

// These two are called by every thread of a parallel region and end in a barrier.
void pack_for_shrink(Weights w, int64_t length, int64_t r, float* packed) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < steps(length, kPackStep); ++i)
    PEFT_KERNELS_DISPATCH(pack_shrink, w, length, r, i * kPackStep, std::min(length, (i + 1) * kPackStep), packed);
}

void pack_for_expand(Weights w, int64_t columns, int64_t r, float* packed) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < steps(columns, kPackStep); ++i)
    PEFT_KERNELS_DISPATCH(pack_expand, w, columns, r, i * kPackStep, std::min(columns, (i + 1) * kPackStep), packed);
}

// Starting a thread pays for itself from about 2 us of work on.
int useful_threads(const LoraSizes& sizes, int threads) {
  const double work = static_cast<double>(sizes.m) * static_cast<double>(sizes.n + sizes.k) * static_cast<double>(sizes.r);
  return std::clamp(static_cast<int>(std::min(work / 65536.0, 1e6)), 1, std::max(threads, 1));
}

int tile_rows(const LoraSizes& sizes, int64_t tile) {
  return static_cast<int>(std::min<int64_t>(kTileRows, sizes.m - tile * kTileRows));
}

int64_t number_of_parts(const LoraSizes& sizes) {
  const int64_t blocks = steps(sizes.n, kTileColumns) + steps(sizes.k, kTileColumns);
  return std::clamp<int64_t>(steps(sizes.m, kTileRows) / 2, 1, steps(kTasks, blocks));
}

// Running sums over the rows of each part, [parts, r rounded up, columns rounded up], and what becomes of them.
struct Sums {
  int64_t stride, size;
  Buffer<float> parts;

  Sums(int64_t columns, int64_t r, int64_t count)
      : stride(PEFT_KERNELS_DISPATCH(outer_stride, columns)),
        size(PEFT_KERNELS_DISPATCH(outer_size, columns, r)),
        parts(allocate<float>(size * count)) {}

  // The sums of one block of columns, all zero.
  float* clear(int64_t part, int64_t column) {
    float* first = parts.get() + part * size + column;
    for (int64_t row = 0; row < size / stride; ++row)
      std::fill_n(first + row * stride, std::min<int64_t>(kTileColumns, stride - column), 0.0f);
    return first;
  }

  // Adds the parts in order; element (j, c) goes to target[j * stride_j + c * stride_c]. Called by every thread.
  void reduce(int64_t columns, int64_t r, int64_t count, double scale, const Matrix& target, int64_t stride_j,
              int64_t stride_c) const {
    const int64_t width = element_size(target.dtype);
#pragma omp for schedule(static)
    for (int64_t step = 0; step < steps(columns, kPackStep); ++step) {
      const int64_t first = step * kPackStep, length = std::min(kPackStep, columns - first);
      for (int64_t j = 0; j < r; ++j) {
        float total[kPackStep] = {};
        for (int64_t part = 0; part < count; ++part) {
          const float* share = parts.get() + part * size + j * stride + first;
          for (int64_t c = 0; c < length; ++c) total[c] += share[c];
        }
        char* to = static_cast<char*>(target.data) + (j * stride_j + first * stride_c) * width;
        for (int64_t c = 0; c < length; ++c)
          store_element(total[c] * static_cast<float>(scale), to + c * stride_c * width, target.dtype);
      }
    }
  }
};

}  // namespace

void lora_forward(LoraSizes sizes, Matrix x, Matrix y, Matrix s, Matrix lora_A, Matrix lora_B, double scaling,
                  Dropout dropout, int threads) {
  threads = useful_threads(sizes, threads);
  const auto packed_A = allocate<float>(PEFT_KERNELS_DISPATCH(shrink_pack_size, sizes.k, sizes.r));
  const auto packed_B = allocate<float>(PEFT_KERNELS_DISPATCH(expand_pack_size, sizes.n, sizes.r));
  const auto scratch = allocate<Scratch>(threads);
  const LoraForward job{sizes, x, y, s, packed_A.get(), packed_B.get(), scaling, dropout};
#pragma omp parallel num_threads(threads)
  {
    pack_for_shrink(by_columns(lora_A), sizes.k, sizes.r, packed_A.get());
    pack_for_expand(by_rows(lora_B), sizes.n, sizes.r, packed_B.get());
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < steps(sizes.m, kTileRows); ++tile)
      PEFT_KERNELS_DISPATCH(forward_tile, job, tile * kTileRows, tile_rows(sizes, tile),
                            scratch[omp_get_thread_num()]);
  }
}

void lora_backward(LoraSizes sizes, Matrix grad_y, Matrix x, Matrix s, Matrix lora_A, Matrix lora_B, double scaling,
                   Dropout dropout, Matrix grad_x, Matrix grad_A, Matrix grad_B, int threads) {
  threads = useful_threads(sizes, threads);
  const int64_t tiles = steps(sizes.m, kTileRows), parts = number_of_parts(sizes);
  const bool need_a = grad_A.data != nullptr, need_b = grad_B.data != nullptr;
  const bool need_s = need_a || grad_x.data != nullptr;
  const int64_t ranks = tiles * kTileRows * PEFT_KERNELS_DISPATCH(shrink_ranks, sizes.r);
  const auto packed_A = allocate<float>(PEFT_KERNELS_DISPATCH(expand_pack_size, sizes.k, sizes.r));
  const auto packed_B = allocate<float>(PEFT_KERNELS_DISPATCH(shrink_pack_size, sizes.n, sizes.r));
  const auto s_floats = allocate<float>(need_b ? ranks : 0), grad_s = allocate<float>(need_s ? ranks : 0);
  const auto scratch = allocate<Scratch>(threads);
  Sums sums_A(sizes.k, sizes.r, need_a ? parts : 0), sums_B(sizes.n, sizes.r, need_b ? parts : 0);
  const LoraBackward job{sizes,  grad_y,  x,      s,
                         packed_A.get(), packed_B.get(), scaling, dropout,
                         grad_x, need_b ? s_floats.get() : nullptr, need_s ? grad_s.get() : nullptr};
  const int64_t x_blocks = need_s ? steps(sizes.k, kTileColumns) : 0, y_blocks = need_b ? steps(sizes.n, kTileColumns) : 0;
#pragma omp parallel num_threads(threads)
  {
    pack_for_expand(by_columns(lora_A), sizes.k, sizes.r, packed_A.get());
    pack_for_shrink(by_rows(lora_B), sizes.n, sizes.r, packed_B.get());
    Scratch& own = scratch[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile)
      PEFT_KERNELS_DISPATCH(backward_ranks, job, tile * kTileRows, tile_rows(sizes, tile), own);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < (x_blocks + y_blocks) * parts; ++task) {
      const int64_t part = task % parts, block = task / parts;
      const int64_t row = tiles * part / parts * kTileRows;
      const int64_t end = std::min(sizes.m, tiles * (part + 1) / parts * kTileRows);
      if (block < x_blocks) {
        const int64_t column = block * kTileColumns;
        float* sums = need_a ? sums_A.clear(part, column) : nullptr;
        PEFT_KERNELS_DISPATCH(backward_x_block, job, row, end, column, sums, own);
      } else {
        const int64_t column = (block - x_blocks) * kTileColumns;
        PEFT_KERNELS_DISPATCH(backward_y_block, job, row, end, column, sums_B.clear(part, column), own);
      }
    }
    if (need_a) sums_A.reduce(sizes.k, sizes.r, parts, 1.0, grad_A, sizes.k, 1);
    if (need_b) sums_B.reduce(sizes.n, sizes.r, parts, scaling, grad_B, 1, sizes.r);
  }
}

}  // namespace peft_kernels
