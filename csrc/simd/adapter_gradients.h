// From sums over rows, kept for each part of the rows, to the gradients of adapters; included after tile.h.

// Adds the parts of a tile of columns of one adapter's sums in order: [padded ranks, kTileColumns].
inline void total_of_parts(const float* sums, int64_t size, int64_t parts, int64_t ranks, float* total) {
  for (int64_t i = 0; i < ranks * kTileColumns; i += kFloats) {
    Floats sum = load<Floats>(sums + i);
    for (int64_t part = 1; part < parts; ++part) sum += load<Floats>(sums + part * size + i);
    store(total + i, sum);
  }
}

// `ranks` rows of dA from rank `first` on.
inline void store_by_rank(const float* total, int64_t ranks, const Matrix& grad, int64_t first, int64_t column,
                          int columns) {
  with_type(grad.dtype, [&](auto type) {
    for (int64_t j = 0; j < ranks; ++j)
      store_row<decltype(type)>(total + j * kTileColumns, columns, 1.0f, const_cast<char*>(at(grad, first + j, column)));
  });
}

// `ranks` columns of dB from rank `first` on.
inline void store_by_row(const float* total, int64_t ranks, const Matrix& grad, int64_t first, int64_t column,
                         int columns, float scale) {
  alignas(64) float row[kTileRows];
  with_type(grad.dtype, [&](auto type) {
    for (int c = 0; c < columns; ++c) {
      for (int64_t j = 0; j < ranks; ++j) row[j] = total[j * kTileColumns + c];
      store_row<decltype(type)>(row, ranks, scale, const_cast<char*>(at(grad, column + c, first)));
    }
  });
}
