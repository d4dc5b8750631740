// The products of nf4_linear; included by each.h once per vector width.
//
//   dots     y[m, n] = sum_k x[m, k] W[n, k], vectors along k: few rows, W stays in registers
//   forward  the same, vectors along m: decoded weights are the scalars of register tiles
//   backward dx[m, k] = sum_n dY[m, n] W[n, k], vectors along k
//
// The order of each sum depends on the sizes alone. Decoded weights, 32 to a group, lie in the order of nf4_place.

#include "nf4.h"
#include "tile.h"

// The processor does not foresee short pieces of many rows. Beyond the last one there may be nothing: harmless.
PEFT_KERNELS_INLINE void prefetch_row(const Nf4Weight& w, int64_t row, int64_t column, int64_t count) {
  const int64_t first = w.number(row, column);
  for (int64_t i = 0; i < count; i += 128) __builtin_prefetch(w.packed + (first + i) / 2);
  __builtin_prefetch(static_cast<const char*>(w.absmax) + (first >> w.shift) * (w.nested_absmax ? 1 : 4));
}

// ---- few rows --------------------------------------------------------------------------------------------------

// A row of x as floats in the order of the groups, zero up to a whole one.
template <class Type>
PEFT_KERNELS_INLINE void in_group_order(const void* row, int64_t k, float* target) {
  alignas(64) float group[kGroup];
  for (int64_t i = 0; i < k; i += kGroup) {
    const auto* source = static_cast<const typename Type::Storage*>(row) + i;
    load_row<Type, kGroup>(source, std::min<int64_t>(kGroup, k - i), nullptr, 1.0f, group);
    for (int slot = 0; slot < kGroup; ++slot) target[i + slot] = group[nf4_place(slot)];
  }
}

inline void nf4_pack_row(const Matrix& x, int64_t m, int64_t k, float* target) {
  with_type(x.dtype, [&](auto type) { in_group_order<decltype(type)>(at(x, m, 0), k, target); });
}

// sums[m] += x[m, :] · W for `count` elements from number `first` on. Several chains hide the latency of the additions.
template <class Type, int rows>
inline void dots(const Nf4Weight& w, int64_t first, int64_t count, const float* x, int64_t stride, float* sums) {
  constexpr int chains = std::min(kGroupVectors, rows == 1 ? 4 : 2);
  Accumulators<rows, chains> sum;
  typename Decoder<Type>::Table tables[blocks_of(kNf4Run)];
  make_tables(w, first, count, tables);
  for_groups<Type>(w, tables, first, count, [&](int64_t i, const Group& group) {
    unrolled<rows>([&](auto m) {
      unrolled<kGroupVectors>([&](auto v) {
        sum.sum[m][v % chains] += group.value[v] * load<Floats>(x + m * stride + i + v * kFloats);
      });
    });
  });
  unrolled<rows>([&](auto m) {
    Floats all = sum.sum[m][0];
    for (int c = 1; c < chains; ++c) all += sum.sum[m][c];
    sums[m] += sum_lanes(all);
  });
}

// ---- shared by both forms of forward ---------------------------------------------------------------------------

// y[m, row + j] = sums[j * stride + m] + bias, for `count` rows of W.
inline void put_outputs(const float* sums, int64_t stride, int64_t m, const Matrix& bias, const Matrix& y, int64_t row,
                        int64_t column, int count) {
  alignas(64) float shift[kNf4RowsMax], out[kNf4RowsMax];
  std::fill_n(shift, kNf4RowsMax, 0.0f);
  with_type(y.dtype, [&](auto type) {
    using Type = decltype(type);
    if (bias.data) load_row<Type, kFloats>(at(bias, 0, column), count, nullptr, 1.0f, shift);
    for (int64_t i = 0; i < m; ++i) {
      for (int j = 0; j < count; ++j) out[j] = sums[j * stride + i] + shift[j];
      store_row<Type>(out, count, 1.0f, const_cast<char*>(at(y, row + i, column)));
    }
  });
}

// Outputs [begin, begin + count) of up to kNf4FewRows rows. x [m, nf4_few_rows_stride] is in the order of the groups.
inline void nf4_few_rows(const Nf4Product& job, int64_t begin, int count, const float* x) {
  float sums[kNf4RowsMax * kNf4FewRows] = {};
  const int64_t stride = nf4_few_rows_stride(job.w.k), step = nf4_few_rows_step(job.m);
  with_type(job.x.dtype, [&](auto type) {
    using Type = decltype(type);
    for (int64_t k = 0; k < job.w.k; k += step)
      for (int j = 0; j < count; ++j) {
        const int64_t first = job.w.number(begin + j, k), length = std::min(step, job.w.k - k);
        float* to = sums + j * kNf4FewRows;
        prefetch_row(job.w, begin + j + 2, k, length);
        if (job.m == 1) dots<Type, 1>(job.w, first, length, x + k, stride, to);
        if (job.m == 2) dots<Type, 2>(job.w, first, length, x + k, stride, to);
        if (job.m == 3) dots<Type, 3>(job.w, first, length, x + k, stride, to);
        if (job.m == 4) dots<Type, 4>(job.w, first, length, x + k, stride, to);
      }
  });
  put_outputs(sums, kNf4FewRows, job.m, job.bias, job.y, job.row, begin, count);
}

// ---- many rows -------------------------------------------------------------------------------------------------

// Rows of x stand side by side in panels as wide as a register tile.
inline int64_t nf4_panel(int64_t m) { return m <= kFloats ? kFloats : kPanel; }

// Columns [begin, begin + kGroup) of x as rows of the panels, each panel [padded K, panel width].
inline void nf4_pack_columns(const Nf4Product& job, int64_t begin, float* packed) {
  const int64_t width = nf4_panel(job.m), k = round_up(job.w.k, kGroup);
  alignas(64) float group[kGroup];
  with_type(job.x.dtype, [&](auto type) {
    for (int64_t m = 0; m < round_up(job.m, width); ++m) {
      const int64_t columns = std::min<int64_t>(kGroup, job.w.k - begin);
      if (m < job.m) load_row<decltype(type), kGroup>(at(job.x, job.row + m, begin), columns, nullptr, 1.0f, group);
      else std::memset(group, 0, sizeof group);
      float* to = packed + m / width * width * k + begin * width + m % width;
      for (int slot = 0; slot < kGroup; ++slot) to[slot * width] = group[nf4_place(slot)];
    }
  });
}

// `count` <= kNf4Columns elements from each of `rows` rows as floats [rows, stride] in the order of the groups.
template <class Type>
inline void decode_rows(const Nf4Weight& w, int64_t row, int rows, int64_t column, int64_t count, float* target,
                        int64_t stride) {
  constexpr int once = 8;
  typename Decoder<Type>::Table tables[once][blocks_of(kNf4Columns)];
  for (int begin = 0; begin < rows; begin += once) {
    const int end = std::min(rows, begin + once);
    for (int j = begin; j < end; ++j) {
      prefetch_row(w, row + j + kNf4PrefetchRows, column, count);
      make_tables(w, w.number(row + j, column), count, tables[j - begin]);
    }
    for (int j = begin; j < end; ++j)
      for_groups<Type>(w, tables[j - begin], w.number(row + j, column), count, [&](int64_t i, const Group& group) {
        unrolled<kGroupVectors>([&](auto v) { store(target + j * stride + i + v * kFloats, group.value[v]); });
      });
  }
}

template <int rows, int vectors>
inline void forward_tiles(int count, int64_t terms, int64_t step, const float* weights, const float* panel, float* sums,
                          int64_t stride) {
  for (int64_t first = 0; first < terms; first += step)
    for (int j = 0; j < count; j += rows) {
      Accumulators<rows, vectors> tile;
      tile.multiply_add(std::min(step, terms - first), weights + j * kNf4Stride + first, kNf4Stride, 1,
                        panel + first * vectors * kFloats, vectors * kFloats);
      tile.template put<true>(sums + j * stride, stride);
    }
}

// Outputs [begin, begin + count) of job.m rows. `packed` as of nf4_pack_columns; scratch has kNf4Stride floats and one
// for each column of the panels, for each of kNf4RowsMax rows.
inline void nf4_forward(const Nf4Product& job, int64_t begin, int count, const float* packed, float* scratch) {
  const int64_t width = nf4_panel(job.m), stride = round_up(job.m, width), k = round_up(job.w.k, kGroup);
  const int64_t step = chain(job.w.k);
  float *weights = scratch, *sums = scratch + kNf4RowsMax * kNf4Stride;
  std::fill_n(scratch, kNf4RowsMax * (kNf4Stride + stride), 0.0f);
  with_type(job.x.dtype, [&](auto type) {
    for (int64_t first = 0; first < job.w.k; first += kNf4Terms) {
      const int64_t terms = std::min<int64_t>(kNf4Terms, job.w.k - first);
      decode_rows<decltype(type)>(job.w, begin, count, first, terms, weights, kNf4Stride);
      for (int64_t m = 0; m < stride; m += width) {
        const float* panel = packed + m * k + first * width;
        const int64_t whole = round_up(terms, kGroup);
        if (width == kFloats) forward_tiles<kTallRows, 1>(count, whole, step, weights, panel, sums + m, stride);
        else forward_tiles<kBlockRows, 2>(count, whole, step, weights, panel, sums + m, stride);
      }
    }
  });
  put_outputs(sums, stride, job.m, job.bias, job.y, job.row, begin, count);
}

// ---- the gradient of x -----------------------------------------------------------------------------------------

// Columns [begin, begin + kNf4RowsOnce) of dY as floats [m, kNf4RowsOnce].
inline void nf4_pack_terms(const Nf4Product& job, int64_t begin, float* target) {
  const int64_t columns = std::min<int64_t>(kNf4RowsOnce, job.w.n - begin);
  with_type(job.x.dtype, [&](auto type) {
    for (int64_t m = 0; m < job.m; ++m) {
      float* to = target + m * kNf4RowsOnce;
      load_row<decltype(type), kFloats>(at(job.x, job.row + m, begin), columns, nullptr, 1.0f, to);
    }
  });
}

// Register tiles of any shape fill a strip, which stays in the L1 cache for all rows of dY.
constexpr int kStrip = 96;
static_assert(kNf4Columns % kStrip == 0 && kStrip % (6 * kFloats) == 0, "whole register tiles");

template <int rows, int vectors>
inline void backward_tiles(int64_t terms, const float* grad, const float* weights, float* sums) {
  for (int c = 0; c < kStrip; c += vectors * kFloats) {
    Accumulators<rows, vectors> tile;
    tile.multiply_add(terms, grad, kNf4RowsOnce, 1, weights + c, kNf4Columns);
    tile.template put<true>(sums + c, kNf4Columns);
  }
}

// Rows in register tiles of almost the same height.
inline void backward_strip(int64_t m, int64_t terms, const float* grad, const float* weights, float* sums) {
  for (int64_t tiles = (m + kBlockRows - 1) / kBlockRows, i = 0, rows; tiles > 0; --tiles, i += rows) {
    rows = (m - i + tiles - 1) / tiles;
    const float* left = grad + i * kNf4RowsOnce;
    float* to = sums + i * kNf4Columns;
    if (rows == 1) backward_tiles<1, 6>(terms, left, weights, to);
    if (rows == 2) backward_tiles<2, 6>(terms, left, weights, to);
    if (rows == 3) backward_tiles<3, 3>(terms, left, weights, to);
    if (rows == 4) backward_tiles<4, 3>(terms, left, weights, to);
    if (rows == 5) backward_tiles<5, 2>(terms, left, weights, to);
    if (rows == 6) backward_tiles<6, 2>(terms, left, weights, to);
  }
}

template <class Type>
inline void store_groups(const float* source, int64_t columns, void* row) {
  alignas(64) float group[kGroup];
  for (int64_t i = 0; i < columns; i += kGroup) {
    for (int slot = 0; slot < kGroup; ++slot) group[nf4_place(slot)] = source[i + slot];
    store_row<Type>(group, std::min<int64_t>(kGroup, columns - i), 1.0f, static_cast<typename Type::Storage*>(row) + i);
  }
}

// Columns [begin, begin + columns) of dx for job.m rows. `grad` is dY as of nf4_pack_terms, piece after piece; scratch
// has kNf4Columns floats for each of kNf4RowsOnce + job.m rows.
inline void nf4_backward(const Nf4Product& job, int64_t begin, int64_t columns, const float* grad, float* scratch) {
  float *weights = scratch, *sums = scratch + kNf4RowsOnce * kNf4Columns;
  const int64_t whole = round_up(columns, kGroup);  // a group's weights lie in any of its slots
  std::fill_n(scratch, (kNf4RowsOnce + job.m) * kNf4Columns, 0.0f);
  with_type(job.x.dtype, [&](auto type) {
    for (int64_t row = 0; row < job.w.n; row += kNf4RowsOnce) {
      const int rows = static_cast<int>(std::min<int64_t>(kNf4RowsOnce, job.w.n - row));
      decode_rows<decltype(type)>(job.w, row, rows, begin, columns, weights, kNf4Columns);
      for (int64_t c = 0; c < whole; c += kStrip)
        backward_strip(job.m, rows, grad + row * job.m, weights + c, sums + c);
    }
    for (int64_t m = 0; m < job.m; ++m)
      store_groups<decltype(type)>(sums + m * kNf4Columns, columns, const_cast<char*>(at(job.y, job.row + m, begin)));
  });
}
