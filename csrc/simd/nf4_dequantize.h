// Rows of a weight in NF4 in full; included by each.h once per vector width.

#include "nf4.h"

// Columns [begin, end) of a row, no more than kNf4Run, in `dtype`.
inline void nf4_write(const Nf4Weight& w, int dtype, int64_t row, int64_t begin, int64_t end, void* target) {
  const int64_t first = w.number(row, begin), count = end - begin;
  if (dtype == kFloat32) write_run<FloatWriter>(w, first, count, static_cast<float*>(target));
  if (dtype == kBFloat16) write_run<HalfWriter<BFloat16>>(w, first, count, static_cast<uint16_t*>(target));
  if (dtype == kFloat16) write_run<HalfWriter<Float16>>(w, first, count, static_cast<uint16_t*>(target));
}
