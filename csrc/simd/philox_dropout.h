// Dropout of a run of one row; included by each.h once per vector width.

template <class Type>
inline void dropout_run(const void* x, void* out, int64_t columns, const int16_t* masks, double scale) {
  using Storage = typename Type::Storage;
  const auto* source = static_cast<const Storage*>(x);
  auto* target = static_cast<Storage*>(out);
  const Floats factor = splat(static_cast<float>(scale));
  int64_t i = 0;
  for (; i + kFloats <= columns; i += kFloats)
    Type::store_floats(target + i, masked(Type::load_floats(source + i) * factor, masks + i));
  if (i == columns) return;
  Storage last[kFloats] = {};
  std::memcpy(last, source + i, (columns - i) * sizeof(Storage));
  Type::store_floats(last, masked(Type::load_floats(last) * factor, masks + i));
  std::memcpy(target + i, last, (columns - i) * sizeof(Storage));
}

inline void dropout_run_float64(const void* x, void* out, int64_t columns, const int16_t* masks, double scale) {
  const auto* source = static_cast<const double*>(x);
  auto* target = static_cast<double*>(out);
  for (int64_t i = 0; i < columns; ++i) target[i] = masks[i] ? source[i] * scale : 0.0;
}

// `columns` is at most kDropoutRun; `counter` is that of the run's first element.
inline void dropout(const void* x, void* out, int64_t columns, int dtype, uint64_t seed, uint64_t counter,
                    uint32_t threshold, double scale) {
  alignas(64) int16_t masks[kDropoutRun + kMaskStep * kPhiloxLanes];
  keep_masks(PhiloxKeys(seed), counter, philox_groups(columns), threshold, masks);
  if (dtype == kFloat64) return dropout_run_float64(x, out, columns, masks, scale);
  with_type(dtype, [&](auto type) { dropout_run<decltype(type)>(x, out, columns, masks, scale); });
}
