// Rows of a weight in NF4 in full; included by each.h once per vector width.

#include "nf4.h"

// Columns [begin, end) of a row, rounded to `dtype`, into memory of that dtype or, with `as_float`, of floats.
inline void nf4_write(const Nf4Weight& w, int dtype, bool as_float, int64_t row, int64_t begin, int64_t end,
                      void* target) {
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    const int64_t first = w.number(row, begin);
    if constexpr (std::is_same_v<Type, Float32>) {
      write_run<FloatWriter<Type>>(w, first, end - begin, static_cast<float*>(target));
    } else {
      if (as_float) write_run<FloatWriter<Type>>(w, first, end - begin, static_cast<float*>(target));
      else write_run<HalfWriter<Type>>(w, first, end - begin, static_cast<uint16_t*>(target));
    }
  });
}
