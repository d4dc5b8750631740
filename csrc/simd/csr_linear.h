// Products with kept numbers and their columns; included by each.h once per vector width. Blocks of 16 rows of x and dY
// are turned and multiplied as a sparse Δ is; one row is a dot with what it gathers.
//
// Numbers that pad meet a zero that follows the last column. Long sums are cut, as in a matmul: their chains would
// otherwise be as long as what a row keeps.

#include "sparse_delta_linear.h"

// Numbers of a row that are widened, and summed, at a time: by 8 lanes, or by two chains for each row of x. A dense
// product cuts its sums by columns, so that of little that is kept it adds a few numbers at a time.
constexpr int64_t kCsrChain = 256, kCsrPairedChain = 32;

// visit(values, columns, count) for a row's numbers, as floats, at most `chain` at a time.
template <class Index, int64_t chain, class Visitor>
PEFT_KERNELS_INLINE void csr_visit(const CsrWeight& w, int64_t row, Visitor visit) {
  alignas(64) float widened[chain];
  const int64_t stop = int64_t{w.starts[row + 1]} * kCsrGroup;
  const auto* columns = static_cast<const Index*>(w.columns);
  for (int64_t i = int64_t{w.starts[row]} * kCsrGroup; i < stop; i += chain) {
    const int64_t count = std::min(chain, stop - i);
    const float* values = static_cast<const float*>(w.values) + i;
    if (w.dtype != kFloat32) {
      delta_widen(w.dtype, static_cast<const uint16_t*>(w.values) + i, count, widened);
      values = widened;
    }
    visit(values, columns + i, count);
  }
}

// sums[n] of rows [begin, end), of x [K + 1] that ends with 0.
template <class Index>
inline void csr_dots(const CsrWeight& w, int64_t begin, int64_t end, const float* x, float* sums) {
  for (int64_t n = begin; n < end; ++n) {
    float total = 0.0f;
    csr_visit<Index, kCsrChain>(w, n, [&](const float* values, const Index* columns, int64_t count) {
      float lanes[kCsrGroup] = {};
      for (int64_t i = 0; i < count; i += kCsrGroup)
        unrolled<kCsrGroup>([&](auto j) { lanes[j] += values[i + j] * x[columns[i + j]]; });
      for (int half = kCsrGroup / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      total += lanes[0];
    });
    sums[n] = total;
  }
}

// out [N, 16] at rows [begin, end) = W x, of x [K + 1, 16] that ends with zeros.
template <class Index>
inline void csr_forward(const CsrWeight& w, int64_t begin, int64_t end, const float* x, float* out) {
  for (int64_t n = begin; n < end; ++n) {
    float* target = out + n * kDeltaRows;
    unrolled<kDeltaVectors>([&](auto v) { store(target + v * kFloats, Floats{}); });
    csr_visit<Index, kCsrPairedChain>(w, n, [&](const float* values, const Index* columns, int64_t count) {
      alignas(64) float part[kDeltaRows];
      const int64_t bounds[] = {0, count};
      delta_forward(columns, values, bounds, 0, 0, 1, x, part);
      unrolled<kDeltaVectors>([&](auto v) {
        store(target + v * kFloats, load<Floats>(target + v * kFloats) + load<Floats>(part + v * kFloats));
      });
    });
  }
}

// grad_x [K + 1, 16] += Wᵀ dY over rows [begin, end), of dY [N, 16].
template <class Index>
inline void csr_grad_x(const CsrWeight& w, int64_t begin, int64_t end, const float* grad_y, float* grad_x) {
  for (int64_t n = begin; n < end; ++n)
    csr_visit<Index, kCsrChain>(w, n, [&](const float* values, const Index* columns, int64_t count) {
      const int64_t bounds[] = {0, count};
      delta_grad_x(columns, values, bounds, 0, 0, 1, grad_y + n * kDeltaRows, grad_x);
    });
}

// total [count] += part, which becomes 0. `count` is a multiple of 16.
inline void csr_flush(int64_t count, float* part, float* total) {
  for (int64_t i = 0; i < count; i += kFloats) {
    store(total + i, load<Floats>(total + i) + load<Floats>(part + i));
    store(part + i, Floats{});
  }
}

// `target` = the floats, rounded once.
inline void csr_narrow(int dtype, const float* source, int64_t count, void* target) {
  with_type(dtype, [&](auto type) {
    using Storage = typename decltype(type)::Storage;
    auto* out = static_cast<Storage*>(target);
    int64_t i = 0;
    for (; i + kFloats <= count; i += kFloats) decltype(type)::store_floats(out + i, load<Floats>(source + i));
    if (i == count) return;
    Storage last[kFloats];
    float rest[kFloats] = {};
    std::memcpy(rest, source + i, (count - i) * sizeof(float));
    decltype(type)::store_floats(last, load<Floats>(rest));
    std::memcpy(out + i, last, (count - i) * sizeof(Storage));
  });
}
