// The products of masked_linear; included by each.h once per vector width.
//
//   out[i, c] = sum_t left[i, t] right[t, c]
//
//   forward      left x [M, K], right (W ⊙ M)ᵀ          grad_x  left dY [M, N], right W ⊙ M
//   grad_weight  left dYᵀ [N, M], right x, and of out what the mask keeps
//
// A block of out is summed in the L2 cache; of each chunk of terms, left and right come there as floats, where the mask
// costs nothing to speak of. The order of each sum depends on the number of terms alone.

#include "nf4.h"
#include "tile.h"
#include "mask.h"

// ---- a row of the weight ---------------------------------------------------------------------------------------

template <class Type>
PEFT_KERNELS_INLINE Floats rounded_to(Floats value) {
  if constexpr (std::is_same_v<Type, Float32>) return value;
  typename Type::Storage some[kFloats];
  Type::store_floats(some, value);
  return Type::load_floats(some);
}

// The kept ones of 32 weights as floats, rounded to Type.
template <class From, class Type>
PEFT_KERNELS_INLINE void load_weights(const typename From::Storage* source, uint32_t word, float* target) {
  const Words all = word + Words{};
  unrolled<kWordVectors>([&](auto v) {
    const Floats value = kept<v>(From::load_floats(source + v * kFloats), all);
    store(target + v * kFloats, std::is_same_v<From, Type> ? value : rounded_to<Type>(value));
  });
}

template <class From, class Type>
inline void load_dense(const void* row, int64_t columns, const uint32_t* words, float* target) {
  using Storage = typename From::Storage;
  const auto* source = static_cast<const Storage*>(row);
  int64_t i = 0;
  for (; i + kWordBits <= columns; i += kWordBits)
    load_weights<From, Type>(source + i, words ? words[i / kWordBits] : ~0u, target + i);
  if (i == columns) return;
  Storage last[kWordBits] = {};
  std::memcpy(last, source + i, (columns - i) * sizeof(Storage));
  load_weights<From, Type>(last, words ? words[i / kWordBits] : ~0u, target + i);
}

template <class Type>
inline void load_nf4(const Nf4Weight& w, int64_t row, int64_t column, int64_t columns, float* target) {
  typename Decoder<Type>::Table tables[blocks_of(kMaskedPiece)];
  const int64_t first = w.number(row, column);
  make_tables(w, first, columns, tables);
  for_groups<Type>(w, tables, first, columns,
                   [&](int64_t i, const Group& group) { store_in_order(group, target + i); });
}

// target += the update's row: sums over the ranks in registers, of 32 columns at a time.
inline void add_update(const MaskedWeight& w, int64_t row, int64_t column, int64_t columns, float* target) {
  const float* b = w.update_B + row * w.update_ranks;
  for (int64_t i = 0; i < columns; i += kWordBits) {
    Floats sum[kWordVectors];
    unrolled<kWordVectors>([&](auto v) { sum[v] = Floats{}; });
    for (int64_t j = 0; j < w.r; ++j) {
      const float* a = w.update_A + j * w.update_stride + column + i;
      unrolled<kWordVectors>([&](auto v) { sum[v] += splat(b[j]) * load<Floats>(a + v * kFloats); });
    }
    unrolled<kWordVectors>([&](auto v) {
      float* to = target + i + v * kFloats;
      store(to, load<Floats>(to) + sum[v]);
    });
  }
}

// The first of a row's places, [begin, end), that is not before `first`. Half of the tests of a search among random
// numbers are foreseen wrongly: nothing branches on them here.
template <class Index>
PEFT_KERNELS_INLINE const Index* first_place(const Index* begin, int64_t count, int64_t first) {
  while (count > 1) {
    const int64_t half = count / 2;
    begin += begin[half - 1] < first ? half : 0;
    count -= half;
  }
  return begin + (count == 1 && *begin < first);
}

// Where the places of a row's piece begin and, after it, end.
PEFT_KERNELS_INLINE const int64_t* piece_starts_of(const MaskedWeight& w, int64_t row, int64_t column) {
  return w.piece_starts + row * ((w.k + kMaskedPiece - 1) / kMaskedPiece) + column / kMaskedPiece;
}

// target += Δ's row in [column, column + columns), then rounded to Type: W + Δ is rounded once.
template <class Index, class Type>
inline void add_changes(const MaskedWeight& w, int64_t row, int64_t column, int64_t columns, float* target) {
  const auto* flat = static_cast<const Index*>(w.changes.flat);
  const int64_t *starts = piece_starts_of(w, row, column), first = row * w.k + column;
  const Index *place = flat + starts[0], *end = flat + piece_starts_of(w, row, column + columns - 1)[1];
  if (column % kMaskedPiece) place = first_place(place, starts[1] - starts[0], first);
  const float* value = static_cast<const float*>(w.changes.values) + (place - flat);
  for (; place < end && *place < first + columns; ++place, ++value) target[*place - first] += *value;
  if constexpr (!std::is_same_v<Type, Float32>)
    for (int64_t i = 0; i < round_up(columns, kWordBits); i += kFloats)
      store(target + i, rounded_to<Type>(load<Floats>(target + i)));
}

// `columns` <= kMaskedPiece kept weights of a row, rounded to Type, as floats; zeros up to a whole word.
template <class Type>
inline void weight_row(const MaskedWeight& w, int64_t row, int64_t column, int64_t columns, float* target) {
  const uint32_t* words = w.words.data ? w.words.at(row, column) : nullptr;
  const bool changes = w.changes.flat != nullptr;
  const uint32_t* at_once = w.r || changes ? nullptr : words;
  if (w.dense.data) {
    with_type(w.dense.dtype, [&](auto from) {
      const char* source = at(w.dense, row, column);
      if (changes) load_dense<decltype(from), Float32>(source, columns, at_once, target);
      else load_dense<decltype(from), Type>(source, columns, at_once, target);
    });
    if (!w.r && !changes) return;
  } else if (w.nf4.packed) {
    load_nf4<Type>(w.nf4, row, column, columns, target);
  } else {
    std::memset(target, 0, round_up(columns, kWordBits) * sizeof(float));
  }
  if (w.r) add_update(w, row, column, columns, target);
  if (changes && w.changes.wide) add_changes<int64_t, Type>(w, row, column, columns, target);
  if (changes && !w.changes.wide) add_changes<int32_t, Type>(w, row, column, columns, target);
  if (words) keep_row<uint32_t>(target, words, round_up(columns, kWordBits), target);
}

// The processor does not foresee short pieces of many rows. Beyond the last row there may be nothing: harmless.
PEFT_KERNELS_INLINE void prefetch_piece(const Matrix& matrix, int64_t row, int64_t column, int64_t columns) {
  prefetch(at(matrix, row, column), columns * element_size(matrix.dtype));
}

// Of the weight, with where its changes are if the piece's lie evenly.
PEFT_KERNELS_INLINE void prefetch_weight(const MaskedWeight& w, int64_t row, int64_t column, int64_t columns) {
  if (w.dense.data) prefetch_piece(w.dense, row, column, columns);
  if (!w.changes.flat || row >= w.n) return;
  const int64_t *starts = piece_starts_of(w, row, column), count = starts[1] - starts[0];
  const int64_t place = starts[0] + count * (column % kMaskedPiece) / kMaskedPiece, size = w.changes.wide ? 8 : 4;
  const int64_t places = count * columns / kMaskedPiece;
  prefetch(static_cast<const char*>(w.changes.flat) + place * size, places * size);
  prefetch(static_cast<const char*>(w.changes.values) + place * 4, places * 4);
}

// ---- operands of a chunk of terms ------------------------------------------------------------------------------

// right [terms, columns] from rows of the weight, or of x.
template <class Type>
inline void take_rows(const MaskedProduct& job, int64_t term, int64_t terms, int64_t column, int64_t columns,
                      float* right) {
  for (int64_t t = 0; t < terms; ++t) {
    float* to = right + t * kMaskedRightStride;
    if (job.kind == kMaskedGradWeight) {
      prefetch_piece(job.x, term + t + kMaskedPrefetchRows, column, columns);
      load_row<Type, kWordBits>(at(job.x, term + t, column), columns, nullptr, 1.0f, to);
    } else {
      prefetch_weight(*job.weight, term + t + kMaskedPrefetchRows, column, columns);
      weight_row<Type>(*job.weight, term + t, column, columns, to);
    }
  }
}

// The same turned: right [terms, columns] from rows [column, column + columns) of the weight, in registers, a vector's
// rows of 4 columns at a time.
template <class Type>
inline void turn_rows(const MaskedProduct& job, int64_t term, int64_t terms, int64_t column, int64_t columns,
                      float* right) {
  alignas(64) float rows[kFloats * kMaskedLeftStride];
  for (int64_t c = 0; c < round_up(columns, kWordBits); c += kFloats) {
    for (int i = 0; i < kFloats; ++i) {
      prefetch_weight(*job.weight, column + c + i + kMaskedPrefetchRows, term, terms);
      float* to = rows + i * kMaskedLeftStride;
      if (c + i < columns) weight_row<Type>(*job.weight, column + c + i, term, terms, to);
      else std::memset(to, 0, kMaskedLeftStride * sizeof(float));
    }
    for (int64_t t = 0; t < terms; t += 4) {
      Floats four[4];
      unrolled<4>([&](auto i) { four[i] = load_quads(rows + t + i * kMaskedLeftStride, 4 * kMaskedLeftStride); });
      transpose_quads(four);
      unrolled<4>([&](auto i) { store(right + (t + i) * kMaskedRightStride + c, four[i]); });
    }
  }
}

// left [rows, terms]; of dY, whose rows are terms, [terms, rows].
template <class Type>
inline void take_left(const MaskedProduct& job, int64_t row, int64_t rows, int64_t term, int64_t terms, float* left) {
  if (job.kind == kMaskedGradWeight) {
    for (int64_t t = 0; t < terms; ++t)
      load_row<Type, kFloats>(at(job.left, term + t, row), rows, nullptr, 1.0f, left + t * kMaskedTurnedStride);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      prefetch_piece(job.left, row + i + kMaskedPrefetchRows, term, terms);
      load_row<Type, kFloats>(at(job.left, row + i, term), terms, nullptr, 1.0f, left + i * kMaskedLeftStride);
    }
  }
}

// ---- the product -----------------------------------------------------------------------------------------------

template <bool turned, int rows, int vectors>
PEFT_KERNELS_INLINE void masked_tile(int64_t terms, int64_t step, const float* left, const float* right, float* sums) {
  constexpr int64_t left_row = turned ? 1 : kMaskedLeftStride, left_step = turned ? kMaskedTurnedStride : 1;
  for (int64_t t = 0; t < terms; t += step) {
    Accumulators<rows, vectors> tile;
    tile.multiply_add(std::min(step, terms - t), left + t * left_step, left_row, left_step,
                      right + t * kMaskedRightStride, kMaskedRightStride);
    tile.template put<true>(sums, kMaskedRightStride);
  }
}

// As many rows as there are at most 6 of, by whole words of columns; of few rows more vectors hide the latency.
template <bool turned, int rows>
inline void masked_rows(int64_t columns, int64_t terms, int64_t step, const float* left, const float* right,
                        float* sums) {
  constexpr int vectors = rows <= 2 ? std::min(4, kWordVectors) : 2;
  for (int64_t c = 0; c < columns; c += vectors * kFloats)
    masked_tile<turned, rows, vectors>(terms, step, left, right + c, sums + c);
}

template <bool turned>
inline void masked_multiply(int64_t rows, int64_t columns, int64_t terms, int64_t step, const float* left,
                            const float* right, float* sums) {
  constexpr int64_t left_row = turned ? 1 : kMaskedLeftStride;
  // A panel of right stays in the L1 cache for all rows.
  for (int64_t c = 0; c < columns; c += kWordBits) {
    const int64_t width = std::min<int64_t>(kWordBits, columns - c);
    for (int64_t tiles = (rows + kBlockRows - 1) / kBlockRows, i = 0, height; tiles > 0; --tiles, i += height) {
      height = (rows - i + tiles - 1) / tiles;
      const float* from = left + i * left_row;
      float* to = sums + i * kMaskedRightStride + c;
      if (height == 1) masked_rows<turned, 1>(width, terms, step, from, right + c, to);
      if (height == 2) masked_rows<turned, 2>(width, terms, step, from, right + c, to);
      if (height == 3) masked_rows<turned, 3>(width, terms, step, from, right + c, to);
      if (height == 4) masked_rows<turned, 4>(width, terms, step, from, right + c, to);
      if (height == 5) masked_rows<turned, 5>(width, terms, step, from, right + c, to);
      if (height == 6) masked_rows<turned, 6>(width, terms, step, from, right + c, to);
    }
  }
}

// ---- where the sums go -----------------------------------------------------------------------------------------

// Sums of the row's places in [column, column + columns); places ascend.
template <class Index>
inline void gather(const MaskedPlaces& places, int64_t row, int64_t k, int64_t column, int64_t columns,
                   const float* sums) {
  const auto* flat = static_cast<const Index*>(places.flat);
  const int64_t strip = row / places.strip, first = row * k + column;
  const Index* end = flat + places.starts[strip + 1];
  const Index* begin = std::lower_bound(flat + places.starts[strip], end, static_cast<Index>(first));
  alignas(64) float some[kMaskedColumns];
  int64_t count = 0;
  for (; begin + count < end && begin[count] < first + columns; ++count) some[count] = sums[begin[count] - first];
  with_type(places.dtype, [&](auto type) {
    auto* values = static_cast<typename decltype(type)::Storage*>(places.values);
    store_row<decltype(type)>(some, count, 1.0f, values + (begin - flat));
  });
}

inline void put_sums(const MaskedProduct& job, int64_t row, int64_t rows, int64_t column, int64_t columns,
                     float* sums) {
  alignas(64) float shift[kMaskedColumns] = {};
  if (job.bias.data)
    with_type(job.bias.dtype, [&](auto type) {
      load_row<decltype(type), kFloats>(at(job.bias, 0, column), columns, nullptr, 1.0f, shift);
    });
  for (int64_t i = 0; i < rows; ++i) {
    float* from = sums + i * kMaskedRightStride;
    if (job.places) {
      if (job.places->wide) gather<int64_t>(*job.places, row + i, job.columns, column, columns, from);
      else gather<int32_t>(*job.places, row + i, job.columns, column, columns, from);
      continue;
    }
    if (job.words.data) keep_row<uint32_t>(from, job.words.at(row + i, column), columns, from);
    if (job.bias.data)
      for (int64_t c = 0; c < round_up(columns, kFloats); c += kFloats)
        store(from + c, load<Floats>(from + c) + load<Floats>(shift + c));
    with_type(job.out.dtype, [&](auto type) {
      store_row<decltype(type)>(from, columns, 1.0f, const_cast<char*>(at(job.out, row + i, column)));
    });
  }
}

// Rows [row, row + rows) and columns [column, column + columns) of out. Scratch has kMaskedScratch floats.
inline void masked_block(const MaskedProduct& job, int64_t row, int64_t rows, int64_t column, int64_t columns,
                         float* scratch) {
  float *left = scratch, *right = left + kMaskedLeft, *sums = right + kMaskedTerms * kMaskedRightStride;
  std::memset(sums, 0, rows * kMaskedRightStride * sizeof(float));
  const int64_t parts = std::max<int64_t>(1, (job.terms + kMaskedTerms - 1) / kMaskedTerms);
  const int64_t size = round_up(std::max<int64_t>(1, (job.terms + parts - 1) / parts), kWordBits);
  const int64_t width = round_up(columns, kWordBits), step = job.terms < 128 ? 24 : kMaskedTerms;
  for (int64_t term = 0; term < job.terms; term += size) {
    const int64_t terms = std::min(size, job.terms - term);
    with_type(job.left.dtype, [&](auto type) {
      using Type = decltype(type);
      take_left<Type>(job, row, rows, term, terms, left);
      if (job.kind == kMaskedForward) turn_rows<Type>(job, term, terms, column, columns, right);
      else take_rows<Type>(job, term, terms, column, columns, right);
    });
    if (job.kind == kMaskedGradWeight) masked_multiply<true>(rows, width, terms, step, left, right, sums);
    else masked_multiply<false>(rows, width, terms, step, left, right, sums);
  }
  put_sums(job, row, rows, column, columns, sums);
}

// target [rows, stride] = the matrix as floats times `scale`, in whole words with zeros beyond its columns.
inline void update_floats(const Matrix& matrix, int64_t rows, int64_t columns, float scale, float* target,
                          int64_t stride) {
  with_type(matrix.dtype, [&](auto type) {
    for (int64_t i = 0; i < rows; ++i) {
      float* to = target + i * stride;
      load_row<decltype(type), kWordBits>(at(matrix, i, 0), columns, nullptr, 1.0f, to);
      for (int64_t c = 0; c < columns; ++c) to[c] *= scale;
    }
  });
}
