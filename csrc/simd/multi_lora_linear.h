// The low-rank half of multi_lora_linear on rows that lie anywhere, all of one adapter; included by each.h once per
// vector width. A row's sums have one order, whatever other rows it is computed beside.

#include "tile.h"
#include "adapter_gradients.h"

// ---- down: s = drop(x) Aᵀ ---------------------------------------------------------------------------------------

// A is read where it is and not packed, which would cost a single row more than its product: vectors lie along K.
constexpr int kDotRows = 3, kDotRanks = 4;

// A whole vector, or the `columns` that are left and zeros.
template <class Type, bool whole>
PEFT_KERNELS_INLINE Floats load_some(const typename Type::Storage* source, int columns) {
  if (whole) return Type::load_floats(source);
  typename Type::Storage part[kFloats] = {};
  std::memcpy(part, source, columns * sizeof *source);
  return Type::load_floats(part);
}

template <class Type, bool whole, int rows, int ranks>
PEFT_KERNELS_INLINE void dot_step(Accumulators<rows, ranks>& sums, const float* const* x,
                                  const typename Type::Storage* a, int64_t a_stride, int c, int columns) {
  Floats w[ranks];
  unrolled<ranks>([&](auto j) { w[j] = load_some<Type, whole>(a + j * a_stride + c, columns); });
  unrolled<rows>([&](auto i) {
    const Floats value = load_some<Float32, whole>(x[i] + c, columns);
    unrolled<ranks>([&](auto j) { sums.sum[i][j] += value * w[j]; });
  });
}

// s [rows, ranks] += x [rows, columns] Aᵀ over a span of columns.
template <class Type, int rows, int ranks>
inline void dot_tile(const float* const* x, const typename Type::Storage* a, int64_t a_stride, int columns, float* s,
                     int64_t s_stride) {
  Accumulators<rows, ranks> sums;
  int c = 0;
  for (; c + kFloats <= columns; c += kFloats) dot_step<Type, true>(sums, x, a, a_stride, c, kFloats);
  if (c < columns) dot_step<Type, false>(sums, x, a, a_stride, c, columns - c);
  unrolled<rows>([&](auto i) {
    float* to = s + i * s_stride;
    if constexpr (ranks == 4) {
      Floats four[4];
      unrolled<4>([&](auto j) { four[j] = sums.sum[i][j]; });
      transpose_quads(four);
      store(to, load<Quad>(to) + sum_quads((four[0] + four[1]) + (four[2] + four[3])));
    } else {
      unrolled<ranks>([&](auto j) { to[j] += sum_lanes(sums.sum[i][j]); });
    }
  });
}

template <class Type, int ranks>
inline void dot_rows(const float* const* x, int rows, const typename Type::Storage* a, int64_t a_stride, int columns,
                     float* s, int64_t s_stride) {
  int m = 0;
  for (; m + kDotRows <= rows; m += kDotRows)
    dot_tile<Type, kDotRows, ranks>(x + m, a, a_stride, columns, s + m * s_stride, s_stride);
  if (rows - m == 2) dot_tile<Type, 2, ranks>(x + m, a, a_stride, columns, s + m * s_stride, s_stride);
  if (rows - m == 1) dot_tile<Type, 1, ranks>(x + m, a, a_stride, columns, s + m * s_stride, s_stride);
}

// The masks of kMaskColumns columns of rows that lie anywhere.
inline void masks_of_rows(const Dropout& dropout, int64_t k, const int64_t* rows, int count, int64_t column,
                          int16_t* masks) {
  for (int m = 0; m < count; ++m)
    tile_masks(dropout, k, rows[m], 1, column, masks + static_cast<int64_t>(m) * kMaskColumns);
}

// s [count, r] = drop(x)[rows] Aᵀ. `buffer` [kTileRows, kMaskColumns] and `masks` the same.
inline void multi_down(const Matrix& x, int64_t k, const int64_t* rows, int count, const Matrix& lora_A, int64_t r,
                       const Dropout& dropout, float* buffer, int16_t* masks, float* s, int64_t s_stride) {
  const float* sources[kTileRows];
  const bool in_place = x.dtype == kFloat32 && !dropout.seed;
  const int64_t span = in_place ? 2 * kMaskColumns : kMaskColumns;
  for (int m = 0; m < count; ++m) std::memset(s + m * s_stride, 0, r * sizeof(float));
  for (int64_t first = 0; first < k; first += span) {
    const int columns = static_cast<int>(std::min(span, k - first));
    if (dropout.seed) masks_of_rows(dropout, k, rows, count, first, masks);
    for (int m = 0; m < count; ++m) {
      float* copy = buffer + static_cast<int64_t>(m) * kMaskColumns;
      sources[m] = in_place ? reinterpret_cast<const float*>(at(x, rows[m], first)) : copy;
      if (!in_place)
        with_type(x.dtype, [&](auto type) {
          load_row<decltype(type), kFloats>(at(x, rows[m], first), columns,
                                            dropout.seed ? masks + static_cast<int64_t>(m) * kMaskColumns : nullptr,
                                            static_cast<float>(dropout.scale), copy);
        });
    }
    with_type(lora_A.dtype, [&](auto type) {
      using Type = decltype(type);
      const auto* a = reinterpret_cast<const typename Type::Storage*>(at(lora_A, 0, first));
      int64_t j = 0;
      for (; j + kDotRanks <= r; j += kDotRanks)
        dot_rows<Type, kDotRanks>(sources, count, a + j * lora_A.row_stride, lora_A.row_stride, columns, s + j, s_stride);
      for (; j < r; ++j)
        dot_rows<Type, 1>(sources, count, a + j * lora_A.row_stride, lora_A.row_stride, columns, s + j, s_stride);
    });
  }
}

// ---- up: y[rows] += s Wᵀ, dx[rows] += drop(dS A) ------------------------------------------------------------------

template <class Type, int rows, bool drop, bool whole>
PEFT_KERNELS_INLINE void add_to_rows(const Accumulators<rows, 2>& sums, typename Type::Storage* const* y, int64_t c,
                                     int columns, const int16_t* masks, float scale) {
  unrolled<rows>([&](auto m) {
    unrolled<2>([&](auto v) {
      Floats value = sums.sum[m][v];
      if (drop) value = masked(value * splat(scale), masks + m * kMaskColumns + v * kFloats);
      auto* target = y[m] + c + v * kFloats;
      const int left = columns - v * kFloats;
      if (whole || left >= kFloats) {
        Type::store_floats(target, Type::load_floats(target) + value);
      } else if (left > 0) {
        typename Type::Storage part[kFloats];
        Type::store_floats(part, load_some<Type, false>(target, left) + value);
        std::memcpy(target, part, left * sizeof *target);
      }
    });
  });
}

// Columns [0, columns) of y from `column` on, from panels of `packed`. masks [rows, kMaskColumns] begin there too.
template <class Type, int rows, bool drop>
inline void expand_rows(const float* s, int64_t s_stride, int64_t terms, const float* packed, int64_t ranks,
                        const int16_t* masks, float scale, typename Type::Storage* const* y, int64_t column,
                        int columns) {
  for (int c = 0; c < columns; c += kPanel) {
    Accumulators<rows, 2> sums;
    sums.multiply_add(terms, s, s_stride, 1, packed + c * ranks, kPanel);
    const int16_t* own = drop ? masks + c : nullptr;
    if (c + kPanel <= columns) add_to_rows<Type, rows, drop, true>(sums, y, column + c, kPanel, own, scale);
    else add_to_rows<Type, rows, drop, false>(sums, y, column + c, columns - c, own, scale);
  }
}

// y[rows, column + (0..columns)] += s times a weight packed for expand, masked where there are masks.
inline void multi_expand(const float* s, int64_t s_stride, int64_t terms, const float* packed, int64_t ranks,
                         const int16_t* masks, float scale, const Matrix& y, const int64_t* rows, int count,
                         int64_t column, int columns) {
  with_type(y.dtype, [&](auto type) {
    using Type = decltype(type);
    using Storage = typename Type::Storage;
    Storage* targets[kTileRows];
    for (int m = 0; m < count; ++m) targets[m] = static_cast<Storage*>(y.data) + rows[m] * y.row_stride;
    const auto some = [&](auto height, int m) {
      constexpr int rows_at_once = decltype(height)::value;
      if (masks)
        expand_rows<Type, rows_at_once, true>(s + m * s_stride, s_stride, terms, packed, ranks,
                                              masks + static_cast<int64_t>(m) * kMaskColumns, scale, targets + m, column,
                                              columns);
      else
        expand_rows<Type, rows_at_once, false>(s + m * s_stride, s_stride, terms, packed, ranks, nullptr, scale,
                                               targets + m, column, columns);
    };
    // Of 7 to 11 rows two like tiles: after 6 rows a tile of the few that are left would wait for its operands.
    for (int m = 0; m < count;) {
      const int left = count - m;
      const int height = left < kBlockRows ? left : left < 2 * kBlockRows ? (left + 1) / 2 : kBlockRows;
      unrolled<kBlockRows>([&](auto less) {
        if (height == less + 1) some(std::integral_constant<int, less + 1>{}, m);
      });
      m += height;
    }
  });
}

// The part of a matrix from a column, or a row, on.
inline Matrix from(const Matrix& matrix, int64_t row, int64_t column) {
  return {const_cast<char*>(at(matrix, row, column)), matrix.row_stride, matrix.dtype};
}

// y[rows] += s Bᵀ for columns [begin, end). `packed` [kTileColumns, padded ranks].
inline void multi_up(const float* s, int64_t s_stride, const Matrix& lora_B, int64_t r, const Matrix& y,
                     const int64_t* rows, int count, int64_t begin, int64_t end, float* packed) {
  const int64_t ranks = padded_ranks(r);
  for (int64_t column = begin; column < end; column += kTileColumns) {
    const int columns = tile_columns(column, end);
    pack_expand_by_row(from(lora_B, column, 0), r, 0, columns, 0, packed, ranks);
    multi_expand(s, s_stride, r, packed, ranks, nullptr, 1.0f, y, rows, count, column, columns);
  }
}

// ---- backward ---------------------------------------------------------------------------------------------------

// Rows that lie anywhere as a tile of floats, with zeros up to a whole register tile.
inline void gather_tile(const Matrix& matrix, const int64_t* rows, int count, int64_t column, int columns,
                        const int16_t* masks, float scale, float* tile) {
  for (int m = 0; m < count; ++m)
    with_type(matrix.dtype, [&](auto type) {
      load_row<decltype(type), kOuterVectors * kFloats>(
          at(matrix, rows[m], column), columns, masks ? masks + static_cast<int64_t>(m) * kMaskColumns : nullptr, scale,
          tile + static_cast<int64_t>(m) * kTileColumns);
    });
  for (int m = count; m % kTallRows; ++m) std::memset(tile + m * kTileColumns, 0, kTileColumns * sizeof(float));
}

// grad_s = dY B, and the unit's sums of dBᵀ = sᵀ dY.
inline void multi_backward_up(const MultiUnit& unit, const Matrix& grad_y, int64_t n, const Matrix& lora_B, float* packed,
                              float* tile) {
  if (unit.grad_s) std::memset(unit.grad_s, 0, round_up(unit.count, kTallRows) * unit.ranks * sizeof(float));
  for (int64_t column = 0; column < n; column += kTileColumns) {
    const int columns = tile_columns(column, n);
    if (unit.grad_s)
      pack_shrink_by_row(from(lora_B, column, 0), unit.r, 0, columns, 0, packed, kTileColumns, unit.ranks);
    for (int64_t m = 0; m < unit.count; m += kTileRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, unit.count - m));
      gather_tile(grad_y, unit.rows + m, rows, column, columns, nullptr, 1.0f, tile);
      if (unit.grad_s)
        shrink(tile, kTileColumns, rows, columns, packed, 0, kTileColumns, unit.ranks, unit.grad_s + m * unit.ranks,
               unit.ranks);
      if (unit.sums_B)
        outer(unit.s + m * unit.ranks, unit.ranks, unit.ranks, tile, rows, columns, unit.count, m == 0,
              unit.sums_B + column * unit.ranks);
    }
  }
}

// dx[rows] += drop(grad_s A), and the unit's sums of dA = grad_sᵀ drop(x).
inline void multi_backward_down(const MultiUnit& unit, const Matrix& x, int64_t k, const Matrix& lora_A,
                                const Dropout& dropout, const Matrix& grad_x, float* packed, float* tile,
                                int16_t* masks) {
  const float scale = static_cast<float>(dropout.scale);
  for (int64_t span = 0; span < k; span += kMaskColumns) {
    const int64_t end = std::min(k, span + kMaskColumns);
    if (grad_x.data) pack_expand_by_rank(from(lora_A, 0, span), unit.r, 0, end - span, 0, packed, unit.ranks);
    for (int64_t m = 0; m < unit.count; m += kTileRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, unit.count - m));
      const float* grad_s = unit.grad_s + m * unit.ranks;
      if (dropout.seed) masks_of_rows(dropout, k, unit.rows + m, rows, span, masks);
      for (int64_t column = span; unit.sums_A && column < end; column += kTileColumns) {
        const int columns = tile_columns(column, end);
        gather_tile(x, unit.rows + m, rows, column, columns, dropout.seed ? masks + column - span : nullptr, scale, tile);
        outer(grad_s, unit.ranks, unit.ranks, tile, rows, columns, unit.count, m == 0,
              unit.sums_A + column * unit.ranks);
      }
      if (grad_x.data)
        multi_expand(grad_s, unit.ranks, unit.r, packed, unit.ranks, dropout.seed ? masks : nullptr, scale, grad_x,
                     unit.rows + m, rows, span, static_cast<int>(end - span));
    }
  }
}

// ---- rows of s --------------------------------------------------------------------------------------------------

inline void keep_ranks(const float* s, int64_t r, const Matrix& kept, int64_t row) {
  with_type(kept.dtype, [&](auto type) {
    store_row<decltype(type)>(s, r, 1.0f, const_cast<char*>(at(kept, row, 0)));
  });
}

// The first r columns of a kept row, and zeros up to whole vectors.
inline void kept_ranks(const Matrix& kept, int64_t row, int64_t r, float* s) {
  with_type(kept.dtype, [&](auto type) { load_row<decltype(type), kFloats>(at(kept, row, 0), r, nullptr, 1.0f, s); });
}

inline float dot_ranks(const float* a, const float* b, int64_t r) {
  float total = 0.0f;
  for (int64_t j = 0; j < r; ++j) total += a[j] * b[j];
  return total;
}

inline void scale_row(float* row, int64_t ranks, float factor) {
  for (int64_t j = 0; j < ranks; ++j) row[j] *= factor;
}

// y [rows, columns] += delta, rounded once.
inline void add_floats(const Matrix& y, int64_t row, int64_t columns, const float* delta) {
  alignas(64) float sum[kTileColumns];
  with_type(y.dtype, [&](auto type) {
    for (int64_t column = 0; column < columns; column += kTileColumns) {
      const int count = tile_columns(column, columns);
      load_row<decltype(type), kFloats>(at(y, row, column), count, nullptr, 1.0f, sum);
      for (int i = 0; i < count; ++i) sum[i] += delta[column + i];
      store_row<decltype(type)>(sum, count, 1.0f, const_cast<char*>(at(y, row, column)));
    }
  });
}
