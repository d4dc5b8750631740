// A whole lora_linear of a few thousand multiplications, base matmul included, on buffers of floats that fit the L2 cache;
// included by each.h once per vector width.

#include "tile.h"

// Hands out pieces of a buffer that begin on a cache line.
struct Pool {
  float* next;

  float* take(int64_t rows, int64_t stride) {
    float* taken = next;
    next += round_up(rows * stride, 16);
    return taken;
  }
  float* zeros(int64_t rows, int64_t stride) {
    float* taken = take(rows, stride);
    std::memset(taken, 0, rows * stride * sizeof(float));
    return taken;
  }
};

// Rows of floats, each padded with zeros to whole vectors.
struct Floating {
  float* data;
  int64_t rows, stride;
};

inline Floating floats_of(Pool& pool, const Matrix& matrix, int64_t rows, int64_t columns, const int16_t* masks = nullptr,
                          int64_t mask_stride = 0, float scale = 1.0f) {
  const Floating result{pool.take(rows, round_up(columns, kFloats)), rows, round_up(columns, kFloats)};
  with_type(matrix.dtype, [&](auto type) {
    for (int64_t i = 0; i < rows; ++i)
      load_row<decltype(type), kFloats>(at(matrix, i, 0), columns, masks ? masks + i * mask_stride : nullptr, scale,
                                        result.data + i * result.stride);
  });
  return result;
}

// The transpose of floats_of(rows, columns): `columns` rows.
inline Floating transposed_floats_of(Pool& pool, const Matrix& matrix, int64_t rows, int64_t columns) {
  const Floating plain = floats_of(pool, matrix, rows, columns);
  const Floating result{pool.zeros(columns, round_up(rows, kFloats)), columns, round_up(rows, kFloats)};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) result.data[j * result.stride + i] = plain.data[i * plain.stride + j];
  return result;
}

template <int rows, int vectors>
PEFT_KERNELS_INLINE void add_product(int64_t terms, const float* left, int64_t left_row, int64_t left_step,
                                     const float* right, int64_t stride, float* out) {
  const int step = chain(terms);
  for (int64_t t = 0; t < terms; t += step) {
    Accumulators<rows, vectors> sums;
    sums.multiply_add(std::min<int64_t>(step, terms - t), left + t * left_step, left_row, left_step, right + t * stride,
                      stride);
    sums.template put<true>(out, stride);
  }
}

template <int vectors>
inline void add_product_columns(int64_t rows, int64_t terms, const float* left, int64_t left_row, int64_t left_step,
                                const float* right, int64_t stride, float* out) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    add_product<4, vectors>(terms, left + i * left_row, left_row, left_step, right, stride, out + i * stride);
  for (; i < rows; ++i)
    add_product<1, vectors>(terms, left + i * left_row, left_row, left_step, right, stride, out + i * stride);
}

// [rows, columns of right], the sum over `right`'s rows t of left[i * left_row + t * left_step] * right[t, :].
inline Floating product(Pool& pool, int64_t rows, const float* left, int64_t left_row, int64_t left_step,
                        const Floating& right) {
  const Floating out{pool.zeros(rows, right.stride), rows, right.stride};
  int64_t c = 0;
  for (; c + kPanel <= right.stride; c += kPanel)
    add_product_columns<2>(rows, right.rows, left, left_row, left_step, right.data + c, right.stride, out.data + c);
  if (c < right.stride)
    add_product_columns<1>(rows, right.rows, left, left_row, left_step, right.data + c, right.stride, out.data + c);
  return out;
}

inline Floating product(Pool& pool, const Floating& left, const Floating& right) {
  return product(pool, left.rows, left.data, left.stride, 1, right);
}
inline Floating product_of_transposed(Pool& pool, const Floating& left, int64_t rows, const Floating& right) {
  return product(pool, rows, left.data, 1, left.stride, right);
}

inline void scale_floats(const Floating& values, double scale) {
  for (int64_t i = 0; i < values.rows * values.stride; ++i) values.data[i] *= static_cast<float>(scale);
}

inline void store_floats(const Floating& values, int64_t columns, const Matrix& target) {
  with_type(target.dtype, [&](auto type) {
    for (int64_t i = 0; i < values.rows; ++i)
      store_row<decltype(type)>(values.data + i * values.stride, columns, 1.0f, const_cast<char*>(at(target, i, 0)));
  });
}

// Masks [m, stride] of the whole of x in the pool, or null without dropout.
inline const int16_t* small_masks(Pool& pool, const Dropout& dropout, int64_t m, int64_t k, int64_t stride) {
  if (!dropout.seed) return nullptr;
  auto* masks = reinterpret_cast<int16_t*>(pool.take(m, stride / 2));
  const PhiloxKeys keys(static_cast<uint64_t>(*dropout.seed));
  const int64_t groups = philox_groups(k);
  for (int64_t i = 0; i < m; ++i)
    keep_masks(keys, static_cast<uint64_t>(i * groups), groups, dropout.threshold, masks + i * stride);
  return masks;
}

inline int64_t mask_stride(int64_t k) { return round_up(k, kMaskStep * kPhiloxLanes); }

inline void small_forward(const SmallLayer& layer, float* buffer) {
  const auto& [m, n, k, r] = layer.sizes;
  Pool pool{buffer};
  const int16_t* masks = small_masks(pool, layer.dropout, m, k, mask_stride(k));
  const Floating x = floats_of(pool, layer.x, m, k);
  const Floating dropped = masks ? floats_of(pool, layer.x, m, k, masks, mask_stride(k),
                                             static_cast<float>(layer.dropout.scale)) : x;
  const Floating s = product(pool, dropped, transposed_floats_of(pool, layer.lora_A, r, k));
  store_floats(s, r, layer.s);
  scale_floats(s, layer.scaling);
  const Floating y = product(pool, x, transposed_floats_of(pool, layer.weight, n, k));
  const Floating low_rank = product(pool, {s.data, m, s.stride}, transposed_floats_of(pool, layer.lora_B, n, r));
  const float* bias = layer.bias.data ? floats_of(pool, layer.bias, 1, n).data : pool.zeros(1, y.stride);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < y.stride; ++c)
      y.data[i * y.stride + c] = y.data[i * y.stride + c] + bias[c] + low_rank.data[i * y.stride + c];
  store_floats(y, n, layer.y);
}

inline void small_backward(const SmallLayer& layer, const SmallGradients& grads, float* buffer) {
  const auto& [m, n, k, r] = layer.sizes;
  Pool pool{buffer};
  const Floating grad_y = floats_of(pool, layer.y, m, n);
  if (grads.lora_B.data) {
    const Floating sums = product_of_transposed(pool, grad_y, n, floats_of(pool, layer.s, m, r));
    scale_floats(sums, layer.scaling);
    store_floats(sums, r, grads.lora_B);
  }
  if (!grads.x.data && !grads.lora_A.data) return;
  const int16_t* masks = small_masks(pool, layer.dropout, m, k, mask_stride(k));
  const float keep_scale = static_cast<float>(layer.dropout.scale);
  const Floating grad_s = product(pool, grad_y, floats_of(pool, layer.lora_B, n, r));
  scale_floats(grad_s, layer.scaling);
  if (grads.lora_A.data) {
    const Floating x = floats_of(pool, layer.x, m, k, masks, mask_stride(k), keep_scale);
    store_floats(product_of_transposed(pool, grad_s, r, x), k, grads.lora_A);
  }
  if (!grads.x.data) return;
  const Floating grad_x = product(pool, grad_y, floats_of(pool, layer.weight, n, k));
  const Floating low_rank = product(pool, grad_s, floats_of(pool, layer.lora_A, r, k));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < grad_x.stride; c += kFloats) {
      float* to = grad_x.data + i * grad_x.stride + c;
      Floats value = load<Floats>(low_rank.data + i * grad_x.stride + c);
      if (masks) value = masked(value * splat(keep_scale), masks + i * mask_stride(k) + c);
      store(to, load<Floats>(to) + value);
    }
  store_floats(grad_x, k, grads.x);
}
