// Products with a sparse Δ over a block of 16 rows of x, dY or y, turned: a cache line holds one column of the block.
// Included by each.h once per vector width.
//
// Each place is then 16 products on contiguous floats, whatever its column, and nothing is added across lanes but a
// place's gradient, by the same tree at every width.

constexpr int kDeltaRows = 16;
constexpr int kDeltaVectors = kDeltaRows / kFloats;

// Columns of rows[0], rows[4], ... side by side, four of each.
PEFT_KERNELS_INLINE Floats quads_of(const float* const* rows, int64_t column) {
#if PEFT_KERNELS_VECTOR_BYTES == 32
  return _mm256_insertf128_ps(_mm256_castps128_ps256(load<Quad>(rows[0] + column)), load<Quad>(rows[4] + column), 1);
#elif PEFT_KERNELS_VECTOR_BYTES == 64
  const __m256 low =
      _mm256_insertf128_ps(_mm256_castps128_ps256(load<Quad>(rows[0] + column)), load<Quad>(rows[4] + column), 1);
  const __m256 high =
      _mm256_insertf128_ps(_mm256_castps128_ps256(load<Quad>(rows[8] + column)), load<Quad>(rows[12] + column), 1);
  return _mm512_insertf32x8(_mm512_insertf32x8(Floats{}, low, 0), high, 1);
#else
  return load<Floats>(rows[0] + column);
#endif
}

// panel [columns, 16] = 16 rows, turned in registers.
inline void delta_turn(const float* const* rows, int64_t columns, float* panel) {
  int64_t column = 0;
  for (; column + 4 <= columns; column += 4)
    unrolled<kDeltaVectors>([&](auto vector) {
      Floats quads[4];
      unrolled<4>([&](auto i) { quads[i] = quads_of(rows + vector * kFloats + i, column); });
      transpose_quads(quads);
      unrolled<4>([&](auto i) { store(panel + (column + i) * kDeltaRows + vector * kFloats, quads[i]); });
    });
  for (; column < columns; ++column)
    for (int row = 0; row < kDeltaRows; ++row) panel[column * kDeltaRows + row] = rows[row][column];
}

// The first `count` rows += panel [columns, 16], turned back.
inline void delta_add_turned(const float* panel, int64_t columns, int count, float* const* rows) {
  int64_t column = 0;
  for (; column + 4 <= columns; column += 4)
    unrolled<kDeltaVectors>([&](auto vector) {
      Floats quads[4];
      unrolled<4>([&](auto i) { quads[i] = load<Floats>(panel + (column + i) * kDeltaRows + vector * kFloats); });
      transpose_quads(quads);
      alignas(64) float lanes[4][kFloats];
      unrolled<4>([&](auto i) { store(lanes[i], quads[i]); });
      for (int row = 0; row < kFloats && vector * kFloats + row < count; ++row) {
        float* target = rows[vector * kFloats + row] + column;
        store(target, load<Quad>(target) + load<Quad>(lanes[row % 4] + row / 4 * 4));
      }
    });
  for (; column < columns; ++column)
    for (int row = 0; row < count; ++row) rows[row][column] += panel[column * kDeltaRows + row];
}

// A row in any dtype as floats; `target` has room for whole vectors.
inline void delta_widen(int dtype, const void* row, int64_t columns, float* target) {
  with_type(dtype, [&](auto type) {
    using Storage = typename decltype(type)::Storage;
    const auto* source = static_cast<const Storage*>(row);
    int64_t i = 0;
    for (; i + kFloats <= columns; i += kFloats) store(target + i, decltype(type)::load_floats(source + i));
    if (i == columns) return;
    Storage last[kFloats] = {};
    std::memcpy(last, source + i, (columns - i) * sizeof(Storage));
    store(target + i, decltype(type)::load_floats(last));
  });
}

// Below, rows [begin, end) of Δ take part; row n has the places starts[n] to starts[n + 1].

// out [N, 16] at those rows = Δ x, of x [K, 16].
template <class Index>
inline void delta_forward(const Index* flat, const float* values, const int64_t* starts, int64_t k, int64_t begin,
                          int64_t end, const float* x, float* out) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = n * k, stop = starts[n + 1];
    Floats even[kDeltaVectors] = {}, odd[kDeltaVectors] = {};
    int64_t i = starts[n];
    for (; i + 2 <= stop; i += 2) {
      const float *one = x + (flat[i] - first) * kDeltaRows, *two = x + (flat[i + 1] - first) * kDeltaRows;
      const Floats value_one = splat(values[i]), value_two = splat(values[i + 1]);
      unrolled<kDeltaVectors>([&](auto v) {
        even[v] += value_one * load<Floats>(one + v * kFloats);
        odd[v] += value_two * load<Floats>(two + v * kFloats);
      });
    }
    if (i < stop) {
      const float* one = x + (flat[i] - first) * kDeltaRows;
      const Floats value = splat(values[i]);
      unrolled<kDeltaVectors>([&](auto v) { even[v] += value * load<Floats>(one + v * kFloats); });
    }
    unrolled<kDeltaVectors>([&](auto v) { store(out + n * kDeltaRows + v * kFloats, even[v] + odd[v]); });
  }
}

// grad_x [K, 16] += Δᵀ dY, of dY [N, 16].
template <class Index>
inline void delta_grad_x(const Index* flat, const float* values, const int64_t* starts, int64_t k, int64_t begin,
                         int64_t end, const float* grad_y, float* grad_x) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = n * k;
    Floats grad[kDeltaVectors];
    unrolled<kDeltaVectors>([&](auto v) { grad[v] = load<Floats>(grad_y + n * kDeltaRows + v * kFloats); });
    for (int64_t i = starts[n]; i < starts[n + 1]; ++i) {
      float* target = grad_x + (flat[i] - first) * kDeltaRows;
      const Floats value = splat(values[i]);
      unrolled<kDeltaVectors>([&](auto v) {
        store(target + v * kFloats, load<Floats>(target + v * kFloats) + value * grad[v]);
      });
    }
  }
}

// sums [nnz] at the places of those rows += dY · x, each over the 16 rows of the block. Four places at a time are added
// across lanes together.
template <class Index>
inline void delta_grad_values(const Index* flat, const int64_t* starts, int64_t k, int64_t begin, int64_t end,
                              const float* grad_y, const float* x, float* sums) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = n * k, stop = starts[n + 1];
    Floats grad[kDeltaVectors];
    unrolled<kDeltaVectors>([&](auto v) { grad[v] = load<Floats>(grad_y + n * kDeltaRows + v * kFloats); });
    const auto products = [&](int64_t i) {
      const float* source = x + (flat[i] - first) * kDeltaRows;
      Floats total{};
      unrolled<kDeltaVectors>([&](auto v) { total += grad[v] * load<Floats>(source + v * kFloats); });
      return total;
    };
    const auto added = [&](Floats(&parts)[4]) {
      transpose_quads(parts);
      return sum_quads((parts[0] + parts[1]) + (parts[2] + parts[3]));
    };
    int64_t i = starts[n];
    for (; i + 4 <= stop; i += 4) {
      Floats parts[4];
      unrolled<4>([&](auto j) { parts[j] = products(i + j); });
      store(sums + i, load<Quad>(sums + i) + added(parts));
    }
    if (i == stop) continue;
    Floats parts[4] = {};
    for (int j = 0; i + j < stop; ++j) parts[j] = products(i + j);
    const Quad rest = added(parts);
    for (int j = 0; i + j < stop; ++j) sums[i + j] += rest[j];
  }
}
