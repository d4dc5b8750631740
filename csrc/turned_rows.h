// Blocks of 16 rows of a matrix, turned so that a column of the block is contiguous: what products with sparse weights
// read and write. Included after simd/each.h with a body that has simd/sparse_delta_linear.h.
#pragma once

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "cpu_kernels.h"

namespace peft_kernels {
namespace {

constexpr int64_t kRows = 16;  // of a block

int64_t padded(int64_t columns) { return (columns + kRows - 1) / kRows * kRows; }

// The first row of a sparse matrix of each of `parts` with about as many places.
template <class Start>
std::vector<int64_t> cut_rows(const Start* starts, int64_t n, int64_t parts) {
  std::vector<int64_t> cuts;
  for (int64_t part = 0; part < parts; ++part)
    cuts.push_back(part == 0 ? 0 : std::lower_bound(starts, starts + n, starts[n] / parts * part) - starts);
  cuts.push_back(n);
  return cuts;
}

// The 16 rows of a block, as floats: where they lie in float32, `copies` [16, padded] in other dtypes, zeros beyond the
// last one.
struct BlockRows {
  const int64_t* rows;  // which rows of the matrix, null: the first m
  int64_t m;
  Matrix matrix;
  int64_t columns;
  const float* zeros;

  char* row(int64_t i) const {
    const int64_t number = rows ? rows[i] : i;
    return static_cast<char*>(matrix.data) + number * matrix.row_stride * element_size(matrix.dtype);
  }

  void turn(int64_t first, float* copies, float* panel) const {
    const float* lines[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      if (first + i >= m) {
        lines[i] = zeros;
      } else if (matrix.dtype == kFloat32) {
        lines[i] = reinterpret_cast<const float*>(row(first + i));
      } else {
        float* copy = copies + i * padded(columns);
        PEFT_KERNELS_DISPATCH(delta_widen, matrix.dtype, row(first + i), columns, copy);
        lines[i] = copy;
      }
    }
    PEFT_KERNELS_DISPATCH(delta_turn, lines, columns, panel);
  }

  void add(int64_t first, const float* panel) const {
    float* lines[kRows];
    const int64_t count = std::min(kRows, m - first);
    for (int64_t i = 0; i < count; ++i) lines[i] = reinterpret_cast<float*>(row(first + i));
    PEFT_KERNELS_DISPATCH(delta_add_turned, panel, columns, static_cast<int>(count), lines);
  }
};

Buffer<float> zero_floats(int64_t count) {
  auto zeros = allocate<float>(count);
  std::fill_n(zeros.get(), count, 0.0f);
  return zeros;
}

}  // namespace
}  // namespace peft_kernels
