// Tiles of rows and columns as floats, packed weights, and three register-tiled products; included by the bodies that
// each.h compiles once per vector width.
//
//   shrink  s[m, :] += sum_c tile[m, c] w[c, :]       (S = drop(x) Aᵀ; dS = dY B)
//   expand  y[m, c]    += sum_j s[m, j] w[j, c]       (y += S Bᵀ; dx += drop(dS A))
//   outer   c[j, c] += sum_m s[m, j] tile[m, c]       (dA = dSᵀ drop(x); dBᵀ = Sᵀ dY)
//
// Vectors lie along the contiguous dimension of the result, so that a result is summed in the same order at every vector
// width and by every number of threads. Ranks are padded to whole vectors with zeros.

// 12 accumulators keep two FMA units of latency 4 busy and leave 4 of 16 registers for operands: 6 x 2 and 12 x 1 where
// one operand is a column of scalars, 4 x 3 for `outer`, whose scalars are ranks.
constexpr int kBlockRows = 6, kTallRows = 12;
constexpr int kPanel = 2 * kFloats;  // columns of a register tile of shrink and expand
constexpr int kOuterRanks = 4, kOuterVectors = 3;
static_assert(kTileRows % kTallRows == 0 && kTileColumns % kPanel == 0 && kTileColumns % (kOuterVectors * kFloats) == 0,
              "tiles are whole register tiles");

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t padded_ranks(int64_t r) { return round_up(r, kFloats); }

inline const char* at(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * element_size(matrix.dtype);
}

inline int tile_columns(int64_t column, int64_t length) {
  return static_cast<int>(std::min<int64_t>(kTileColumns, length - column));
}

// ---- rows as floats --------------------------------------------------------------------------------------------

// Times `scale` and masked where there are masks; zero up to a multiple of `width`.
template <class Type, int width>
PEFT_KERNELS_INLINE void load_row(const void* row, int64_t columns, const int16_t* masks, float scale, float* target) {
  using Storage = typename Type::Storage;
  const auto* source = static_cast<const Storage*>(row);
  const auto put = [&](Floats value, int64_t i) {
    store(target + i, masks ? masked(value * splat(scale), masks + i) : value);
  };
  int64_t i = 0;
  for (; i + kFloats <= columns; i += kFloats) put(Type::load_floats(source + i), i);
  if (i < columns) {
    Storage last[kFloats] = {};
    std::memcpy(last, source + i, (columns - i) * sizeof(Storage));
    put(Type::load_floats(last), i);
    i += kFloats;
  }
  for (; i < round_up(columns, width); i += kFloats) store(target + i, Floats{});
}

template <class Type>
inline void store_row(const float* source, int64_t columns, float scale, void* row) {
  using Storage = typename Type::Storage;
  auto* target = static_cast<Storage*>(row);
  int64_t i = 0;
  for (; i + kFloats <= columns; i += kFloats) Type::store_floats(target + i, load<Floats>(source + i) * splat(scale));
  if (i == columns) return;
  Storage last[kFloats];
  Floats value{};
  std::memcpy(&value, source + i, (columns - i) * sizeof(float));
  Type::store_floats(last, value * splat(scale));
  std::memcpy(target + i, last, (columns - i) * sizeof(Storage));
}

// Asks for the cache lines of a row's part before it is needed: of the tile to the right of the one at hand. The
// processor's own prefetch does not follow short pieces of many rows. Beyond the last column is the next row: harmless.
PEFT_KERNELS_INLINE void prefetch(const char* bytes, int64_t count) {
  for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(bytes + i);
}

// Rows beyond the last one are zero up to a whole register tile: they are computed too, and never stored.
inline void load_tile(const Matrix& matrix, int64_t row, int rows, int64_t column, int columns, const int16_t* masks,
                      float scale, float* tile) {
  with_type(matrix.dtype, [&](auto type) {
    using Type = decltype(type);
    for (int m = 0; m < rows; ++m) {
      float* target = tile + m * kTileColumns;
      const char* source = at(matrix, row + m, column);
      prefetch(source + sizeof(typename Type::Storage) * kTileColumns, sizeof(typename Type::Storage) * kTileColumns);
      if (masks) load_row<Type, kOuterVectors * kFloats>(source, columns, masks + m * kMaskColumns, scale, target);
      else load_row<Type, kOuterVectors * kFloats>(source, columns, nullptr, scale, target);
    }
  });
  for (int m = rows; m % kTallRows; ++m) std::memset(tile + m * kTileColumns, 0, kTileColumns * sizeof(float));
}

// Masks of kMaskColumns columns from `column` on, for several tiles: Philox has whole vectors of counters to fill.
static_assert(kMaskColumns % (kMaskStep * kPhiloxLanes) == 0 && kMaskColumns % kTileColumns == 0, "whole vectors, tiles");
inline void tile_masks(const Dropout& dropout, int64_t k, int64_t row, int rows, int64_t column, int16_t* masks) {
  const int64_t columns = std::min<int64_t>(kMaskColumns, k - column);
  const PhiloxKeys keys(static_cast<uint64_t>(*dropout.seed));
  for (int m = 0; m < rows; ++m) {
    const uint64_t counter = static_cast<uint64_t>(row + m) * philox_groups(k) + column / kPhiloxLanes;
    keep_masks(keys, counter, philox_groups(columns), dropout.threshold, masks + m * kMaskColumns);
  }
}

// ---- packed weights --------------------------------------------------------------------------------------------

// `rows` [count, length] as the right operand of shrink and expand. Either is cut into panels as wide as a register tile;
// each panel is [other dimension, width].

// For shrink: panels of kPanel ranks (the last one of kFloats, if that is enough), each [length, width].
inline int panel_width(int64_t first, int64_t ranks) { return ranks - first > kFloats ? kPanel : kFloats; }

struct ShrinkPanels {
  float* packed;
  int64_t length, ranks;

  float* place(int64_t i, int64_t rank) const {
    const int64_t first = rank / kPanel * kPanel;
    return packed + first * length + i * panel_width(first, ranks) + rank - first;
  }
};

// Packs positions [begin, end) of a weight whose ranks lie along its rows (A [r, K]) as the ranks from `first` on.
inline void pack_shrink_by_rank(const Matrix& weight, int64_t r, int64_t begin, int64_t end, int64_t first,
                                float* packed, int64_t length, int64_t ranks) {
  const ShrinkPanels target{packed, length, ranks};
  alignas(64) float row[kTileColumns];
  with_type(weight.dtype, [&](auto type) {
    for (int64_t j = 0; j < padded_ranks(r); ++j) {
      if (j < r) load_row<decltype(type), kFloats>(at(weight, j, begin), end - begin, nullptr, 1.0f, row);
      else std::memset(row, 0, sizeof row);
      float* to = target.place(begin, first + j);
      const int64_t step = target.place(begin + 1, first + j) - to;
      for (int64_t i = 0; i < end - begin; ++i) to[i * step] = row[i];
    }
  });
}

// The same for a weight whose ranks lie along its columns (B [N, r]).
inline void pack_shrink_by_row(const Matrix& weight, int64_t r, int64_t begin, int64_t end, int64_t first,
                               float* packed, int64_t length, int64_t ranks) {
  const ShrinkPanels target{packed, length, ranks};
  alignas(64) float row[kMaxRank];
  with_type(weight.dtype, [&](auto type) {
    for (int64_t i = begin; i < end; ++i) {
      load_row<decltype(type), kFloats>(at(weight, i, 0), r, nullptr, 1.0f, row);
      for (int64_t j = 0; j < padded_ranks(r); j += kFloats) store(target.place(i, first + j), load<Floats>(row + j));
    }
  });
}

// For expand: panels of kPanel columns, each [ranks, kPanel].
inline float* expand_panel(float* packed, int64_t ranks, int64_t column, int64_t rank) {
  return packed + column * ranks + rank * kPanel;
}

inline void pack_expand_by_rank(const Matrix& weight, int64_t r, int64_t begin, int64_t end, int64_t first,
                                float* packed, int64_t ranks) {
  with_type(weight.dtype, [&](auto type) {
    for (int64_t column = begin; column < end; column += kPanel)
      for (int64_t j = 0; j < padded_ranks(r); ++j) {
        float* to = expand_panel(packed, ranks, column, first + j);
        const int64_t columns = std::min<int64_t>(kPanel, end - column);
        if (j < r) load_row<decltype(type), kPanel>(at(weight, j, column), columns, nullptr, 1.0f, to);
        else std::memset(to, 0, kPanel * sizeof(float));
      }
  });
}

// A vector's columns of 4 ranks, turned in registers. Float after float took several times as long as the product with
// few rows.
PEFT_KERNELS_INLINE void turn(const float* source, int64_t stride, float* panel) {
  Floats rows[4];
  unrolled<4>([&](auto i) { rows[i] = load_quads(source + i * stride, 4 * stride); });
  transpose_quads(rows);
  unrolled<4>([&](auto i) { store(panel + i * kPanel, rows[i]); });
}

// The same of all ranks, of any type, where there are `count` columns from `source` on; zeros in place of the others.
template <class Type>
inline void pack_columns(const typename Type::Storage* source, int64_t stride, int64_t r, int count, float* panel) {
  constexpr int kStep = 64;
  alignas(64) float part[kFloats * kStep];
  for (int64_t first = 0; first < padded_ranks(r); first += kStep) {
    const int64_t some = std::min<int64_t>(kStep, r - first);
    for (int i = 0; i < kFloats; ++i) {
      if (i < count) load_row<Type, kFloats>(source + i * stride + first, some, nullptr, 1.0f, part + i * kStep);
      else std::memset(part + i * kStep, 0, padded_ranks(some) * sizeof(float));
    }
    for (int64_t j = 0; j < padded_ranks(some); j += 4) turn(part + j, kStep, panel + (first + j) * kPanel);
  }
}

// The same for a weight whose ranks lie along its columns (B [N, r]).
inline void pack_expand_by_row(const Matrix& weight, int64_t r, int64_t begin, int64_t end, int64_t first,
                               float* packed, int64_t ranks) {
  with_type(weight.dtype, [&](auto type) {
    using Type = decltype(type);
    for (int64_t c = begin; c < round_up(end, kPanel); c += kFloats) {
      const auto* source = reinterpret_cast<const typename Type::Storage*>(at(weight, c, 0));
      float* to = expand_panel(packed, ranks, c / kPanel * kPanel, first) + c % kPanel;
      const int count = static_cast<int>(std::clamp<int64_t>(end - c, 0, kFloats));
      if constexpr (std::is_same_v<Type, Float32>)
        if (count == kFloats && r % kFloats == 0) {
          for (int64_t j = 0; j < r; j += 4) turn(source + j, weight.row_stride, to + j * kPanel);
          continue;
        }
      pack_columns<Type>(source, weight.row_stride, r, count, to);
    }
  });
}

// ---- register tiles --------------------------------------------------------------------------------------------

// The accumulators of a register tile. Every index into them is a constant and everything that touches them is inlined:
// otherwise the compiler keeps them in memory.
template <int rows, int vectors>
struct Accumulators {
  Floats sum[rows][vectors];

  PEFT_KERNELS_INLINE Accumulators() {
    unrolled<rows>([&](auto i) { unrolled<vectors>([&](auto v) { sum[i][v] = Floats{}; }); });
  }

  // Element by element: a copy of the whole would move the original out of the registers.
  PEFT_KERNELS_INLINE Accumulators(const Accumulators& other) {
    unrolled<rows>([&](auto i) { unrolled<vectors>([&](auto v) { sum[i][v] = other.sum[i][v]; }); });
  }

  // sum[i, :] += sum_t left[i * left_row + t * left_step] * right[t * right_step, :] over `terms` terms
  PEFT_KERNELS_INLINE void multiply_add(int64_t terms, const float* left, int64_t left_row, int64_t left_step,
                                        const float* right, int64_t right_step) {
    for (int64_t t = 0; t < terms; ++t) {
      Floats w[vectors];
      unrolled<vectors>([&](auto v) { w[v] = load<Floats>(right + t * right_step + v * kFloats); });
      unrolled<rows>([&](auto i) {
        const Floats factor = splat(left[i * left_row + t * left_step]);
        unrolled<vectors>([&](auto v) { sum[i][v] += factor * w[v]; });
      });
    }
  }

  template <bool add>
  PEFT_KERNELS_INLINE void put(float* target, int64_t stride) const {
    unrolled<rows>([&](auto i) {
      unrolled<vectors>([&](auto v) {
        float* to = target + i * stride + v * kFloats;
        store(to, add ? load<Floats>(to) + sum[i][v] : sum[i][v]);
      });
    });
  }
};

// Terms that a register tile sums before they are added to memory. Shorter chains round less, and add more often: long
// sums are cut by their tiles anyway.
inline int chain(int64_t length) { return length < 384 ? 24 : kTileColumns; }

// Adds a tile's `columns` to all `ranks` of s. `packed` holds a weight of `length` rows; the tile starts at row `first`.
template <int rows, int vectors>
inline void shrink_panel(const float* tile, int64_t tile_stride, int tile_rows, int columns, int step,
                         const float* panel, float* s, int64_t s_stride) {
  for (int m = 0; m < tile_rows; m += rows)
    for (int c = 0; c < columns; c += step) {
      Accumulators<rows, vectors> sums;
      sums.multiply_add(std::min(step, columns - c), tile + m * tile_stride + c, tile_stride, 1,
                        panel + c * vectors * kFloats, vectors * kFloats);
      sums.template put<true>(s + m * s_stride, s_stride);
    }
}

inline void shrink(const float* tile, int64_t tile_stride, int rows, int columns, const float* packed, int64_t first,
                   int64_t length, int64_t ranks, float* s, int64_t s_stride) {
  const int step = chain(length);
  for (int64_t rank = 0; rank < ranks; rank += kPanel) {
    const int width = panel_width(rank, ranks);
    const float* panel = packed + rank * length + first * width;
    if (width == kPanel)
      shrink_panel<kBlockRows, 2>(tile, tile_stride, rows, columns, step, panel, s + rank, s_stride);
    else
      shrink_panel<kTallRows, 1>(tile, tile_stride, rows, columns, step, panel, s + rank, s_stride);
  }
}

// sums [ranks, kTileColumns] += sᵀ tile, or = where they are the first; `length` is that of the whole sum.
inline void outer(const float* s, int64_t s_stride, int64_t ranks, const float* tile, int rows, int columns,
                  int64_t length, bool first, float* sums) {
  constexpr int width = kOuterVectors * kFloats;
  const int step = chain(length);
  for (int c = 0; c < columns; c += width)
    for (int64_t j = 0; j < ranks; j += kOuterRanks)
      for (int m = 0; m < rows; m += step) {
        Accumulators<kOuterRanks, kOuterVectors> total;
        total.multiply_add(std::min(step, rows - m), s + m * s_stride + j, 1, s_stride, tile + m * kTileColumns + c,
                           kTileColumns);
        float* to = sums + j * kTileColumns + c;
        if (first && m == 0) total.template put<false>(to, kTileColumns);
        else total.template put<true>(to, kTileColumns);
      }
}

using Tile = Accumulators<kBlockRows, 2>;

// y[m, c] += sum[m, c], masked, where a whole register tile lies inside y.
template <class Type, bool drop>
PEFT_KERNELS_INLINE void add_tile(typename Type::Storage* y, int64_t stride, const Tile& tile, const int16_t* masks,
                                  float scale) {
  unrolled<kBlockRows>([&](auto m) {
    unrolled<2>([&](auto v) {
      auto* target = y + m * stride + v * kFloats;
      Floats value = tile.sum[m][v];
      if (drop) value = masked(value * splat(scale), masks + m * kMaskColumns + v * kFloats);
      Type::store_floats(target, Type::load_floats(target) + value);
    });
  });
}

// The product of a register tile of expand, and where it goes.
template <class Type>
struct Expansion {
  const float* s;
  int64_t s_stride, terms;
  const float* packed;  // of the tile's first column
  int64_t ranks;
  const int16_t* masks;
  float scale;
  typename Type::Storage* y;
  int64_t stride;

  PEFT_KERNELS_INLINE Tile product(int m, int c) const {
    Tile sums;
    sums.multiply_add(terms, s + m * s_stride, s_stride, 1, packed + c * ranks, kPanel);
    return sums;
  }
};

// At the edges of y a register tile is added to a copy of the part that there is.
template <class Type, bool drop>
__attribute__((noinline)) void expand_edge(const Expansion<Type>& job, int m, int c, int rows, int columns) {
  using Storage = typename Type::Storage;
  Storage copy[kBlockRows * kPanel] = {};
  Storage* y = job.y + m * job.stride + c;
  for (int i = 0; i < rows; ++i) std::memcpy(copy + i * kPanel, y + i * job.stride, columns * sizeof(Storage));
  add_tile<Type, drop>(copy, kPanel, job.product(m, c), drop ? job.masks + m * kMaskColumns + c : nullptr, job.scale);
  for (int i = 0; i < rows; ++i) std::memcpy(y + i * job.stride, copy + i * kPanel, columns * sizeof(Storage));
}

// Row after row of register tiles, which the processor's prefetch follows; down the columns took 1.2 times as long.
template <class Type, bool drop>
inline void expand_tile(const Expansion<Type> job, int rows, int columns) {
  for (int m = 0; m < rows; m += kBlockRows) {
    const int height = std::min(kBlockRows, rows - m), whole = height == kBlockRows ? columns / kPanel * kPanel : 0;
    for (int c = 0; c < whole; c += kPanel)
      add_tile<Type, drop>(job.y + m * job.stride + c, job.stride, job.product(m, c),
                           drop ? job.masks + m * kMaskColumns + c : nullptr, job.scale);
    for (int c = whole; c < columns; c += kPanel)
      expand_edge<Type, drop>(job, m, c, height, std::min(kPanel, columns - c));
  }
}

// Adds `terms` ranks of s times a weight packed for expand, of `ranks` ranks, to a block of y at (row, column). `packed`
// is the weight's panel at that column; masks and scale (null: none) are dropout's.
inline void expand(const float* s, int64_t s_stride, int64_t terms, const float* packed, int64_t ranks,
                   const int16_t* masks, float scale, const Matrix& y, int64_t row, int rows, int64_t column,
                   int columns) {
  with_type(y.dtype, [&](auto type) {
    using Type = decltype(type);
    auto* to = static_cast<typename Type::Storage*>(y.data) + row * y.row_stride + column;
    const Expansion<Type> job{s, s_stride, terms, packed, ranks, masks, scale, to, y.row_stride};
    if (masks) expand_tile<Type, true>(job, rows, columns);
    else expand_tile<Type, false>(job, rows, columns);
  });
}
