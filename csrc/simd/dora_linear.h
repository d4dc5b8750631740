// What dora_linear does to rows of u = x Wᵀ + s S Bᵀ and of dY beside the products; included by each.h once per vector
// width.

inline Floats load_at(const float* source, int64_t i) { return load<Floats>(source + i); }

// Calls step(i, load, store) for whole vectors of a row, and once more for what is left by way of padded copies.
template <class Type, class Step>
inline void for_row(int64_t columns, Step step) {
  using Storage = typename Type::Storage;
  const auto load_whole = [](const Storage* source) { return Type::load_floats(source); };
  const auto store_whole = [](Storage* target, Floats value) { Type::store_floats(target, value); };
  int64_t i = 0;
  for (; i + kFloats <= columns; i += kFloats) step(i, load_whole, store_whole);
  if (i == columns) return;
  const size_t bytes = static_cast<size_t>(columns - i) * sizeof(Storage);
  step(
      i,
      [bytes](const Storage* source) {
        Storage values[kFloats] = {};
        std::memcpy(values, source, bytes);
        return Type::load_floats(values);
      },
      [bytes](Storage* target, Floats value) {
        Storage values[kFloats];
        Type::store_floats(values, value);
        std::memcpy(target, values, bytes);
      });
}

// y = u * g + bias. g and bias are padded to whole vectors.
inline void dora_scale_row(int dtype, const void* u, const float* g, const float* bias, void* y, int64_t columns) {
  with_type(dtype, [&](auto type) {
    using Storage = typename decltype(type)::Storage;
    const auto* from = static_cast<const Storage*>(u);
    auto* to = static_cast<Storage*>(y);
    for_row<decltype(type)>(columns, [&](int64_t i, auto load_some, auto store_some) {
      store_some(to + i, load_some(from + i) * load_at(g, i) + load_at(bias, i));
    });
  });
}

// grad_u = grad_y * g where grad_u is given; products += grad_y * u where u is; sums += grad_y.
inline void dora_backward_row(int dtype, const void* grad_y, const void* u, const float* g, void* grad_u, float* products,
                              float* sums, int64_t columns) {
  with_type(dtype, [&](auto type) {
    using Storage = typename decltype(type)::Storage;
    const auto *dy = static_cast<const Storage*>(grad_y), *values = static_cast<const Storage*>(u);
    auto* du = static_cast<Storage*>(grad_u);
    for_row<decltype(type)>(columns, [&](int64_t i, auto load_some, auto store_some) {
      const Floats grad = load_some(dy + i);
      if (du) store_some(du + i, grad * load_at(g, i));
      if (values) store(products + i, load_at(products, i) + grad * load_some(values + i));
      store(sums + i, load_at(sums, i) + grad);
    });
  });
}

inline void add_and_clear(double* total, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    total[i] += values[i];
    values[i] = 0.0f;
  }
}
