// Masks of one bit an element: made, read and applied in one pass each, bound by memory.
#include "buffer.h"
#include "cpu_kernels.h"

#define PEFT_KERNELS_BODY "mask.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

constexpr int64_t kPiece = 8192;               // columns of a task: whole words
constexpr int64_t kElementsPerThread = 32768;  // starting a thread pays for itself from there on

// Calls piece(row, column, columns) for all of a matrix.
template <class Piece>
void for_pieces(int64_t rows, int64_t columns, int threads, Piece piece) {
  const int64_t parts = (columns + kPiece - 1) / kPiece;
  const int wanted = static_cast<int>(std::clamp<int64_t>(rows * columns / kElementsPerThread, 1, std::max(threads, 1)));
#pragma omp parallel for schedule(static) num_threads(wanted)
  for (int64_t task = 0; task < rows * parts; ++task) {
    const int64_t row = task / parts, column = task % parts * kPiece;
    piece(row, column, std::min(kPiece, columns - column));
  }
}

char* element(const Matrix& matrix, int64_t row, int64_t column) {
  const int64_t size = matrix.dtype == kByte ? 1 : element_size(matrix.dtype);
  return static_cast<char*>(matrix.data) + (row * matrix.row_stride + column) * size;
}

}  // namespace

void mask_pack(int64_t n, int64_t k, Matrix values, const float* threshold, int64_t threshold_stride, bool magnitude,
               uint32_t* words, int threads) {
  const int64_t row_words = (k + 31) / 32;
  for_pieces(n, k, threads, [&](int64_t row, int64_t column, int64_t columns) {
    PEFT_KERNELS_DISPATCH(mask_pack_row, element(values, row, column), values.dtype, columns,
                          threshold ? threshold + row * threshold_stride : nullptr, magnitude,
                          words + row * row_words + column / 32);
  });
}

void mask_unpack(int64_t n, int64_t k, MaskWords words, uint8_t* out, int threads) {
  for_pieces(n, k, threads, [&](int64_t row, int64_t column, int64_t columns) {
    PEFT_KERNELS_DISPATCH(mask_unpack_row, words.at(row, column), columns, out + row * k + column);
  });
}

void mask_apply(int64_t n, int64_t k, Matrix weight, MaskWords words, Matrix out, int threads) {
  if (out.data != weight.data) advise_huge_pages(out.data, n * out.row_stride * element_size(out.dtype));
  for_pieces(n, k, threads, [&](int64_t row, int64_t column, int64_t columns) {
    PEFT_KERNELS_DISPATCH(mask_row, element(weight, row, column), weight.dtype, words.at(row, column), columns,
                          element(out, row, column), out.dtype);
  });
}

}  // namespace peft_kernels
