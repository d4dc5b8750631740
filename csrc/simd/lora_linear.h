// The low-rank half of lora_linear on one tile of rows; included by each.h once per vector width.
//
// Three register-tiled products, all with vectors along the contiguous result dimension, so that a result is summed in
// the same order at every vector width and by every number of threads:
//   shrink  s[m, :]    += sum_c tile[m, c] w[c, :]       (S = drop(x) Aᵀ; dS = dY B)
//   expand  y[m, c]    += sum_j s[m, j] w[j, c]          (y += S Bᵀ; dx += drop(dS A))
//   outer   c[j, c]    += sum_m s[m, j] tile[m, c]       (dA = dSᵀ drop(x); dBᵀ = Sᵀ dY)

constexpr int kRowBlock = 4;          // rows of a register tile: 4 rows x 2 vectors = 8 accumulators hide the FMA latency
constexpr int kPanel = 2 * kFloats;   // columns of a register tile

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// ---- packed weights --------------------------------------------------------------------------------------------

// Panels of kPanel ranks (the last one of kFloats, if that is enough), each [length, width]; zero beyond r.
inline int panel_width(int64_t first, int64_t r) { return r - first > kFloats ? kPanel : kFloats; }
inline int64_t shrink_ranks(int64_t r) { return round_up(r, kFloats); }
inline int64_t shrink_pack_size(int64_t length, int64_t r) { return length * shrink_ranks(r); }

inline void pack_shrink(Weights w, int64_t length, int64_t r, int64_t begin, int64_t end, float* packed) {
  for (int64_t first = 0; first < r; first += kPanel) {
    const int width = panel_width(first, r);
    float* panel = packed + first * length;
    for (int j = 0; j < width; ++j)
      for (int64_t i = begin; i < end; ++i) panel[i * width + j] = first + j < r ? element(w, i, first + j) : 0.0f;
  }
}

// Panels of kPanel columns, each [r, kPanel]; zero beyond `columns`.
inline int64_t expand_pack_size(int64_t columns, int64_t r) { return round_up(columns, kPanel) * r; }

inline void pack_expand(Weights w, int64_t columns, int64_t r, int64_t begin, int64_t end, float* packed) {
  for (int64_t first = begin; first < end; first += kPanel)
    for (int64_t j = 0; j < r; ++j)
      for (int c = 0; c < kPanel; ++c)
        packed[first * r + j * kPanel + c] = first + c < columns ? element(w, first + c, j) : 0.0f;
}

// ---- tiles -----------------------------------------------------------------------------------------------------

// A row piece as float, times `scale` and masked where there are masks; zero up to a whole panel.
template <class Type>
inline void load_row(const void* row, int64_t columns, const int16_t* masks, float scale, float* target) {
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
  for (; i < round_up(columns, kPanel); i += kFloats) store(target + i, Floats{});
}

inline const char* at(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * element_size(matrix.dtype);
}

inline void load_tile(const Matrix& matrix, int64_t row, int rows, int64_t column, int columns, const int16_t* masks,
                      float scale, float* tile) {
  with_type(matrix.dtype, [&](auto type) {
    for (int m = 0; m < rows; ++m)
      load_row<decltype(type)>(at(matrix, row + m, column), columns, masks ? masks + m * kTileColumns : nullptr, scale,
                               tile + m * kTileStride);
  });
  // Register tiles compute whole blocks of rows: what lies beyond the last row must be finite, and is never stored.
  for (int m = rows; m % (2 * kRowBlock); ++m) std::memset(tile + m * kTileStride, 0, kTileColumns * sizeof(float));
}

inline void tile_masks(const Dropout& dropout, int64_t k, int64_t row, int rows, int64_t column, int columns,
                       int16_t* masks) {
  const PhiloxKeys keys(static_cast<uint64_t>(*dropout.seed));
  for (int m = 0; m < rows; ++m) {
    const uint64_t counter = static_cast<uint64_t>(row + m) * philox_groups(k) + column / kPhiloxLanes;
    keep_masks(keys, counter, philox_groups(columns), dropout.threshold,
               masks + m * kTileColumns);
  }
}

// ---- register tiles --------------------------------------------------------------------------------------------

// Terms that a register tile sums before it is added to memory: shorter chains round less.
constexpr int kChain = 16;

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
    const float* row[rows];
    unrolled<rows>([&](auto i) { row[i] = left + i * left_row; });
    for (int64_t t = 0; t < terms; ++t) {
      Floats w[vectors];
      unrolled<vectors>([&](auto v) { w[v] = load<Floats>(right + t * right_step + v * kFloats); });
      unrolled<rows>([&](auto i) {
        const Floats factor = splat(row[i][t * left_step]);
        unrolled<vectors>([&](auto v) { sum[i][v] += factor * w[v]; });
      });
    }
  }

  PEFT_KERNELS_INLINE void add_to(float* target, int64_t stride) const {
    unrolled<rows>([&](auto i) {
      unrolled<vectors>([&](auto v) {
        float* at = target + i * stride + v * kFloats;
        store(at, load<Floats>(at) + sum[i][v]);
      });
    });
  }
};

using Tile = Accumulators<kRowBlock, 2>;

template <int rows, int vectors>
inline void shrink_block(const float* tile, int64_t tile_stride, int columns, const float* panel, float* s,
                         int64_t s_stride) {
  for (int first = 0; first < columns; first += kChain) {
    Accumulators<rows, vectors> sums;
    sums.multiply_add(std::min(kChain, columns - first), tile + first, tile_stride, 1,
                      panel + first * vectors * kFloats, vectors * kFloats);
    sums.add_to(s, s_stride);
  }
}

// `packed` is that of the whole weight; the tile starts at its row `first`.
inline void shrink(const float* tile, int64_t tile_stride, int rows, int columns, const float* packed, int64_t first, int64_t length,
                   int64_t r, float* s) {
  const int64_t stride = shrink_ranks(r);
  for (int64_t rank = 0; rank < r; rank += kPanel) {
    const int width = panel_width(rank, r);
    const float* panel = packed + rank * length + first * width;
    if (width == kPanel) {
      for (int m = 0; m < rows; m += kRowBlock)
        shrink_block<kRowBlock, 2>(tile + m * tile_stride, tile_stride, columns, panel, s + m * stride + rank, stride);
    } else {
      for (int m = 0; m < rows; m += 2 * kRowBlock)
        shrink_block<2 * kRowBlock, 1>(tile + m * tile_stride, tile_stride, columns, panel, s + m * stride + rank, stride);
    }
  }
}

template <class Storage>
struct Rows {
  Storage* first;
  int64_t stride;
};

// y[m, c] += sum[m, c], masked, where a whole register tile lies inside y.
template <class Type, bool drop>
PEFT_KERNELS_INLINE void add_tile(Rows<typename Type::Storage> y, const Tile& tile, const int16_t* masks, float scale) {
  unrolled<kRowBlock>([&](auto m) {
    unrolled<2>([&](auto v) {
      auto* target = y.first + m * y.stride + v * kFloats;
      Floats value = tile.sum[m][v];
      if (drop) value = masked(value * splat(scale), masks + m * kTileColumns + v * kFloats);
      Type::store_floats(target, Type::load_floats(target) + value);
    });
  });
}

// The same at the edges of y: the whole tile is added to a copy of the part that there is.
template <class Type, bool drop>
inline void add_edge(Rows<typename Type::Storage> y, Tile tile, const int16_t* masks, float scale, int rows,
                     int columns) {
  using Storage = typename Type::Storage;
  Storage copy[kRowBlock * kPanel] = {};
  for (int m = 0; m < rows; ++m) std::memcpy(copy + m * kPanel, y.first + m * y.stride, columns * sizeof(Storage));
  add_tile<Type, drop>({copy, kPanel}, tile, masks, scale);
  for (int m = 0; m < rows; ++m) std::memcpy(y.first + m * y.stride, copy + m * kPanel, columns * sizeof(Storage));
}

template <class Type, bool drop>
inline void expand_tile(const float* s, int64_t r, const float* packed, const int16_t* masks, float scale,
                        Rows<typename Type::Storage> y, int rows, int columns) {
  const int64_t s_stride = shrink_ranks(r);
  for (int m0 = 0; m0 < rows; m0 += kRowBlock) {
    for (int c0 = 0; c0 < columns; c0 += kPanel) {
      const float* panel = packed + c0 * r;
      Tile sums;
      sums.multiply_add(r, s + m0 * s_stride, s_stride, 1, panel, kPanel);
      const Rows<typename Type::Storage> target{y.first + m0 * y.stride + c0, y.stride};
      const int16_t* tile_masks = drop ? masks + m0 * kTileColumns + c0 : nullptr;
      if (m0 + kRowBlock <= rows && c0 + kPanel <= columns) {
        add_tile<Type, drop>(target, sums, tile_masks, scale);
      } else {
        add_edge<Type, drop>(target, sums, tile_masks, scale, std::min(kRowBlock, rows - m0),
                             std::min(kPanel, columns - c0));
      }
    }
  }
}

inline void expand(const float* s, int64_t r, const float* packed, const int16_t* masks, float scale, const Matrix& y,
                   int64_t row, int rows, int64_t column, int columns) {
  with_type(y.dtype, [&](auto type) {
    using Type = decltype(type);
    auto* first = static_cast<typename Type::Storage*>(y.data) + row * y.row_stride + column;
    const float* panels = packed + column * r;
    if (masks) expand_tile<Type, true>(s, r, panels, masks, scale, {first, y.row_stride}, rows, columns);
    else expand_tile<Type, false>(s, r, panels, nullptr, 1.0f, {first, y.row_stride}, rows, columns);
  });
}

inline int64_t outer_stride(int64_t columns) { return round_up(columns, kPanel) + 16; }
inline int64_t outer_size(int64_t columns, int64_t r) { return outer_stride(columns) * round_up(r, kRowBlock); }

inline void outer(const float* s, int64_t r, const float* tile, int64_t tile_stride, int rows, int columns, float* sums,
                  int64_t stride) {
  const int64_t s_stride = shrink_ranks(r);
  for (int c = 0; c < columns; c += kPanel)
    for (int64_t j = 0; j < r; j += kRowBlock)
      for (int first = 0; first < rows; first += kChain) {
        Tile total;
        total.multiply_add(std::min(kChain, rows - first), s + first * s_stride + j, 1, s_stride,
                           tile + first * tile_stride + c, tile_stride);
        total.add_to(sums + j * stride + c, stride);
      }
}

// ---- one tile of rows, forward and backward --------------------------------------------------------------------

inline void scale_ranks(float* s, int rows, int64_t r, float factor) {
  for (int64_t i = 0; i < rows * shrink_ranks(r); ++i) s[i] *= factor;
}

inline void load_ranks(const Matrix& source, int64_t row, int rows, int64_t r, float* s) {
  const int64_t stride = shrink_ranks(r);
  for (int m = 0; m < rows; ++m)
    for (int64_t j = 0; j < stride; ++j)
      s[m * stride + j] = j < r ? element({source.data, source.row_stride, 1, source.dtype}, row + m, j) : 0.0f;
}

inline void store_ranks(const float* s, const Matrix& target, int64_t row, int rows, int64_t r) {
  for (int m = 0; m < rows; ++m)
    for (int64_t j = 0; j < r; ++j) {
      char* to = const_cast<char*>(at(target, row + m, j));
      store_element(s[m * shrink_ranks(r) + j], to, target.dtype);
    }
}

inline void clear_ranks(float* s, int rows, int64_t r) {
  std::memset(s, 0, round_up(rows, 2 * kRowBlock) * shrink_ranks(r) * sizeof(float));
}

inline void forward_tile(const LoraForward& job, int64_t row, int rows, Scratch& scratch) {
  const auto& [m, n, k, r] = job.sizes;
  const bool drop = job.dropout.seed != nullptr;
  const bool in_place = !drop && job.x.dtype == kFloat32 && rows == kTileRows;
  clear_ranks(scratch.s, rows, r);
  for (int64_t column = 0; column < k; column += kTileColumns) {
    const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, k - column));
    if (in_place) {
      const float* x = static_cast<const float*>(job.x.data) + row * job.x.row_stride + column;
      shrink(x, job.x.row_stride, rows, columns, job.packed_A, column, k, r, scratch.s);
      continue;
    }
    if (drop) tile_masks(job.dropout, k, row, rows, column, columns, scratch.masks);
    load_tile(job.x, row, rows, column, columns, drop ? scratch.masks : nullptr, static_cast<float>(job.dropout.scale),
              scratch.tile);
    shrink(scratch.tile, kTileStride, rows, columns, job.packed_A, column, k, r, scratch.s);
  }
  store_ranks(scratch.s, job.s, row, rows, r);
  scale_ranks(scratch.s, rows, r, static_cast<float>(job.scaling));
  for (int64_t column = 0; column < n; column += kTileColumns) {
    const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, n - column));
    expand(scratch.s, r, job.packed_B, nullptr, 1.0f, job.y, row, rows, column, columns);
  }
}

// Rows of scaling dY B and, when grad_B is wanted, of s, as floats for `outer` and `expand`.
inline void backward_ranks(const LoraBackward& job, int64_t row, int rows, Scratch& scratch) {
  const auto& [m, n, k, r] = job.sizes;
  const int64_t stride = shrink_ranks(r);
  if (job.s_floats) load_ranks(job.s, row, rows, r, job.s_floats + row * stride);
  if (!job.grad_s) return;
  float* grad_s = job.grad_s + row * stride;
  clear_ranks(grad_s, rows, r);
  for (int64_t column = 0; column < n; column += kTileColumns) {
    const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, n - column));
    load_tile(job.grad_y, row, rows, column, columns, nullptr, 1.0f, scratch.tile);
    shrink(scratch.tile, kTileStride, rows, columns, job.packed_B, column, n, r, grad_s);
  }
  scale_ranks(grad_s, rows, r, static_cast<float>(job.scaling));
}

// One block of columns of x over some rows: adds its share of dx, and of dA to `sums` (null: not wanted).
inline void backward_x_block(const LoraBackward& job, int64_t row, int64_t end, int64_t column, float* sums,
                             Scratch& scratch) {
  const auto& [m, n, k, r] = job.sizes;
  const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, k - column));
  const float keep_scale = static_cast<float>(job.dropout.scale);
  const int16_t* masks = job.dropout.seed ? scratch.masks : nullptr;
  for (; row < end; row += kTileRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, end - row));
    const float* grad_s = job.grad_s + row * shrink_ranks(r);
    if (masks) tile_masks(job.dropout, k, row, rows, column, columns, scratch.masks);
    if (job.grad_x.data) expand(grad_s, r, job.packed_A, masks, keep_scale, job.grad_x, row, rows, column, columns);
    if (!sums) continue;
    load_tile(job.x, row, rows, column, columns, masks, keep_scale, scratch.tile);
    outer(grad_s, r, scratch.tile, kTileStride, rows, columns, sums, outer_stride(k));
  }
}

// The same for a block of columns of dY: dBᵀ.
inline void backward_y_block(const LoraBackward& job, int64_t row, int64_t end, int64_t column, float* sums,
                             Scratch& scratch) {
  const auto& [m, n, k, r] = job.sizes;
  const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, n - column));
  for (; row < end; row += kTileRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, end - row));
    load_tile(job.grad_y, row, rows, column, columns, nullptr, 1.0f, scratch.tile);
    outer(job.s_floats + row * shrink_ranks(r), r, scratch.tile, kTileStride, rows, columns, sums, outer_stride(n));
  }
}
