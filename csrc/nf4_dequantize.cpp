// A weight in NF4 in full on the CPU: bound by memory, 4 bits read and 2 or 4 bytes written per element.
#include "buffer.h"
#include "cpu_kernels.h"

#define PEFT_KERNELS_BODY "nf4_dequantize.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

constexpr int64_t kPiece = 4096;              // elements of a run
constexpr int64_t kElementsPerThread = 32768;  // starting a thread pays for itself from there on

}  // namespace

void nf4_dequantize(const Nf4Weight& w, Matrix out, int threads) {
  // Rows without a gap between them are one long row: short ones would start a group each.
  Nf4Weight view = w;
  if (w.row_stride == w.k && out.row_stride == w.k) view.k = w.n * w.k, view.n = 1;
  if (out.row_stride == w.k) advise_huge_pages(out.data, w.n * w.k * element_size(out.dtype));
  const int64_t parts = (view.k + kPiece - 1) / kPiece, pieces = view.n * parts;
  const int wanted = static_cast<int>(std::clamp<int64_t>(w.n * w.k / kElementsPerThread, 1, std::max(threads, 1)));
#pragma omp parallel for schedule(static) num_threads(wanted)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t row = piece / parts, begin = piece % parts * kPiece, end = std::min(view.k, begin + kPiece);
    char* target = static_cast<char*>(out.data) + (row * out.row_stride + begin) * element_size(out.dtype);
    PEFT_KERNELS_DISPATCH(nf4_write, view, out.dtype, row, begin, end, target);
  }
}

}  // namespace peft_kernels
