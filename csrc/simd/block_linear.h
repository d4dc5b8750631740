// The products of block_linear; included by each.h once per vector width.
//
//   forward  y[m, :] += sum_t x[m, t] V[:, t], the block turned once for all rows; few rows: dots along t
//   backward dx[m, :] += sum_j dY[m, j] V[j, :]
//   values   dV[j, :] = sum_m dY[m, j] x[m, :]
//
// Operands are floats of whole blocks, zero beyond the matrix, so that the products know no edges. Each sum goes block by
// block in the order of the block row or column: its bits depend neither on threads nor on the other rows.

#include "tile.h"

// Rows [row, row + rows) of one block of columns as floats [rows, block].
inline void block_pack(const Matrix& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t block,
                       float* target) {
  with_type(matrix.dtype, [&](auto type) {
    using Type = decltype(type);
    for (int64_t m = 0; m < rows; ++m) {
      float* to = target + m * block;
      const char* source = at(matrix, row + m, column);
      // Short pieces of many rows, which the processor does not foresee.
      constexpr int64_t size = sizeof(typename Type::Storage);
      prefetch(source + 8 * matrix.row_stride * size, columns * size);
      load_row<Type, kFloats>(source, columns, nullptr, 1.0f, to);
      for (int64_t c = round_up(columns, kFloats); c < block; c += kFloats) store(to + c, Floats{});
    }
  });
}

// A block as floats [block, block], as it lies or turned.
inline void block_load(const Matrix& values, int64_t place, int64_t block, float* target) {
  with_type(values.dtype, [&](auto type) {
    for (int64_t j = 0; j < block; ++j)
      load_row<decltype(type), kFloats>(at(values, place * block + j, 0), block, nullptr, 1.0f, target + j * block);
  });
}

inline void block_turn(const float* source, int64_t block, float* target) {
  for (int64_t j = 0; j < block; j += kFloats)
    for (int64_t t = 0; t < block; t += 4) {
      Floats rows[4];
      const float* from = source + j * block + t;
      unrolled<4>([&](auto i) { rows[i] = load_quads(from + i * block, 4 * block); });
      transpose_quads(rows);
      unrolled<4>([&](auto i) { store(target + (t + i) * block + j, rows[i]); });
    }
}

// `step` terms are summed in registers before they are added to memory.
template <int rows, int vectors>
inline void block_tiles(int64_t block, int64_t step, const float* left, const float* right, float* sums) {
  for (int64_t c = 0; c < block; c += vectors * kFloats)
    for (int64_t t = 0; t < block; t += step) {
      Accumulators<rows, vectors> tile;
      tile.multiply_add(step, left + t, block, 1, right + t * block + c, block);
      tile.template put<true>(sums + c, block);
    }
}

// Shorter chains round less; long sums are cut by their blocks anyway.
inline int64_t block_chain(int64_t block, int64_t blocks) {
  return blocks * block < 1024 ? 32 : std::min<int64_t>(block, 64);
}

// sums [m, block] += left [m, block] right [block, block]. A tile of one or two rows has more vectors, to hide latency.
inline void block_product(int64_t m, int64_t block, int64_t step, const float* left, const float* right, float* sums) {
  constexpr int wide = 32 / kFloats >= 4 ? 4 : 2;
  for (int64_t tiles = (m + kBlockRows - 1) / kBlockRows, i = 0, rows; tiles > 0; --tiles, i += rows) {
    rows = (m - i + tiles - 1) / tiles;
    const float* from = left + i * block;
    float* to = sums + i * block;
    if (rows == 1) block_tiles<1, wide>(block, step, from, right, to);
    if (rows == 2) block_tiles<2, wide>(block, step, from, right, to);
    if (rows == 3) block_tiles<3, 2>(block, step, from, right, to);
    if (rows == 4) block_tiles<4, 2>(block, step, from, right, to);
    if (rows == 5) block_tiles<5, 2>(block, step, from, right, to);
    if (rows == 6) block_tiles<6, 2>(block, step, from, right, to);
  }
}

// sums [m, block] += left [m, block] times the block `values` [block, block], turned: dots along its rows.
inline void block_dots(int64_t m, int64_t block, const float* left, const float* values, float* sums) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < block; j += 4) {
      Floats sum[4] = {};
      for (int64_t t = 0; t < block; t += kFloats) {
        const Floats x = load<Floats>(left + i * block + t);
        unrolled<4>([&](auto q) { sum[q] += x * load<Floats>(values + (j + q) * block + t); });
      }
      unrolled<4>([&](auto q) { sums[i * block + j + q] += sum_lanes(sum[q]); });
    }
}

inline void block_store(const float* sums, int64_t rows, int64_t block, const Matrix& out, int64_t row, int64_t column,
                        int64_t columns) {
  with_type(out.dtype, [&](auto type) {
    for (int64_t m = 0; m < rows; ++m)
      store_row<decltype(type)>(sums + m * block, columns, 1.0f, const_cast<char*>(at(out, row + m, column)));
  });
}

// One block row of y, or block column of dx, for rows [job.row, job.row + job.m) of the packed operand.
inline void block_line(const BlockLine& job, float* scratch) {
  const int64_t block = job.block, size = block * block, step = block_chain(block, job.end - job.begin);
  float *loaded = scratch, *turned = scratch + size, *sums = scratch + 2 * size;
  std::fill_n(sums, job.m * block, 0.0f);
  if (job.bias.data)
    with_type(job.bias.dtype, [&](auto type) {
      load_row<decltype(type), kFloats>(at(job.bias, 0, job.column), job.columns, nullptr, 1.0f, sums);
      for (int64_t m = 1; m < job.m; ++m) std::memcpy(sums + m * block, sums, block * sizeof(float));
    });
  for (int64_t i = job.begin; i < job.end; ++i) {
    const int64_t place = job.order ? job.order[i] : i;
    const float* left = job.packed + (job.others[i] * job.packed_rows + job.packed_row) * block;
    const float* values = loaded;
    if (job.values.dtype == kFloat32) values = reinterpret_cast<const float*>(at(job.values, place * block, 0));
    else block_load(job.values, place, block, loaded);
    if (job.order) {
      block_product(job.m, block, step, left, values, sums);
    } else if (job.m <= kBlockFewRows) {
      block_dots(job.m, block, left, values, sums);
    } else {
      block_turn(values, block, turned);
      block_product(job.m, block, step, left, turned, sums);
    }
  }
  block_store(sums, job.m, block, job.out, job.row, job.column, job.columns);
}

// One block of dV: sums over all rows, kBlockTerms at a time.
inline void block_gradient(const BlockGradient& job, float* scratch) {
  constexpr int width = 2 * kFloats;
  const int64_t block = job.block;
  float *left = scratch, *right = left + kBlockTerms * block, *sums = right + kBlockTerms * block;
  std::fill_n(sums, block * block, 0.0f);
  for (int64_t m = 0; m < job.m; m += kBlockTerms) {
    const int64_t rows = std::min<int64_t>(kBlockTerms, job.m - m);
    block_pack(job.grad_y, m, rows, job.row * block, std::min(block, job.n - job.row * block), block, left);
    block_pack(job.x, m, rows, job.column * block, std::min(block, job.k - job.column * block), block, right);
    for (int64_t c = 0; c < block; c += width) {
      int64_t j = 0;
      const auto add = [&](auto height) {
        Accumulators<height, 2> tile;
        tile.multiply_add(rows, left + j, 1, block, right + c, block);
        tile.template put<true>(sums + j * block + c, block);
        j += height;
      };
      while (j + 6 <= block) add(std::integral_constant<int, 6>{});
      if (block - j == 4) add(std::integral_constant<int, 4>{});
      if (block - j == 2) add(std::integral_constant<int, 2>{});
    }
  }
  block_store(sums, block, block, job.out, job.place * block, 0, block);
}
