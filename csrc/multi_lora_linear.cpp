// The low-rank half of multi_lora_linear on the CPU, added to the base matmuls, which stay in PyTorch (MKL, oneDNN).
//
// What rows chose is sorted by adapter (counting sort); rows stay where they are, adapters too. Work is cut into units:
// rows of one adapter. Sums over rows (dA, dB) are kept for each unit and added in order at the end; backward's units
// depend on the ids alone, so that bits do not depend on the number of threads. Forward's units may: a row's bits do not
// depend on which unit it is in.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "cpu_kernels.h"
#include "tile_sizes.h"

namespace peft_kernels {

// Rows of dS, and of s, as those of a unit: [rows up to a whole register tile, ranks], zero beyond the last.
struct MultiUnit {
  const int64_t* rows;
  int64_t count;
  int64_t r, ranks;  // padded
  float *s, *grad_s;
  float *sums_A, *sums_B;  // [whole tiles, ranks], or null
};

}  // namespace peft_kernels

#define PEFT_KERNELS_BODY "multi_lora_linear.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

constexpr int kTableWords = 4;

// One adapter in one projection, as the table says.
struct Factors {
  Matrix lora_A, lora_B;
  int64_t r;
  float scaling;
};

Factors factors_of(const MultiBatch& batch, int64_t layer, int64_t adapter) {
  const int64_t* word = batch.table + (adapter * batch.layers + layer) * kTableWords;
  const auto low = [](int64_t value) { return static_cast<int64_t>(static_cast<int32_t>(value)); };
  const auto high = [](int64_t value) { return static_cast<int32_t>(value >> 32); };
  return {{reinterpret_cast<void*>(word[0]), low(word[3]), batch.adapter_dtype},
          {reinterpret_cast<void*>(word[1]), high(word[3]), batch.adapter_dtype},
          low(word[2]),
          float_from_bits(static_cast<uint32_t>(high(word[2])))};
}

// Rows that chose an adapter with one of their choices: positions [begin, end) of `Choices::rows`.
struct Segment {
  int64_t adapter, choice, begin, end;
};

// Rows by choice, then by adapter, then as they are. Within a choice no row occurs twice.
struct Choices {
  std::vector<int64_t> rows;
  std::vector<Segment> segments;

  explicit Choices(const MultiBatch& batch) {
    std::vector<int64_t> ends(static_cast<size_t>(batch.adapters) + 1);
    rows.resize(static_cast<size_t>(batch.m * batch.choices));
    int64_t place = 0;
    for (int64_t choice = 0; choice < batch.choices; ++choice) {
      std::fill(ends.begin(), ends.end(), 0);
      for (int64_t row = 0; row < batch.m; ++row) ++ends[slot(batch, row, choice)];
      for (int64_t adapter = 0; adapter < batch.adapters; ++adapter) {
        const int64_t count = ends[static_cast<size_t>(adapter)];
        ends[static_cast<size_t>(adapter)] = place;
        if (count) segments.push_back({adapter, choice, place, place + count});
        place += count;
      }
      for (int64_t row = 0; row < batch.m; ++row)
        if (const size_t at = slot(batch, row, choice); at < static_cast<size_t>(batch.adapters))
          rows[static_cast<size_t>(ends[at]++)] = row;
    }
    rows.resize(static_cast<size_t>(place));
  }

 private:
  // The adapter, or their number for none.
  static size_t slot(const MultiBatch& batch, int64_t row, int64_t choice) {
    const int64_t id = batch.ids[row * batch.choices + choice];
    return static_cast<size_t>(id < 0 || id >= batch.adapters ? batch.adapters : id);
  }
};

// Rows of one adapter in one projection.
struct Unit {
  int64_t adapter, choice, begin, end;
  Factors factors;
  int64_t first;               // of the unit's rows in the scratch of s, in floats
  int64_t sums_A, sums_B;      // where its sums begin
  bool sum_A, sum_B;
};

struct Work {
  std::vector<Unit> units;
  std::vector<size_t> choice_ends;  // in `units`
  int64_t s_size = 0, most_ranks = 0;
  double products = 0;  // multiplications of one direction
};

int64_t steps(int64_t total, int64_t step) { return (total + step - 1) / step; }
int64_t whole_tiles(int64_t columns) { return steps(columns, kTileColumns) * kTileColumns; }
int64_t ranks_of(const Unit& unit) { return PEFT_KERNELS_DISPATCH(padded_ranks, unit.factors.r); }

// The units of a projection, none of more than `rows` rows.
Work cut(const MultiBatch& batch, const Choices& choices, const MultiProjection& projection, int64_t rows) {
  Work work;
  size_t next = 0;
  for (int64_t choice = 0; choice < batch.choices; ++choice) {
    for (; next < choices.segments.size() && choices.segments[next].choice == choice; ++next) {
      const Segment& segment = choices.segments[next];
      const Factors factors = factors_of(batch, projection.layer, segment.adapter);
      if (factors.r <= 0) continue;
      const int64_t count = segment.end - segment.begin, parts = steps(count, rows);
      for (int64_t part = 0; part < parts; ++part) {
        Unit unit{segment.adapter, choice, segment.begin + count * part / parts,
                  segment.begin + count * (part + 1) / parts, factors, work.s_size, 0, 0, false, false};
        work.s_size += steps(unit.end - unit.begin, 12) * 12 * ranks_of(unit);  // whole register tiles
        work.most_ranks = std::max(work.most_ranks, ranks_of(unit));
        work.products += static_cast<double>(unit.end - unit.begin) * static_cast<double>(ranks_of(unit)) *
                         static_cast<double>(batch.k + projection.n);
        work.units.push_back(unit);
      }
    }
    work.choice_ends.push_back(work.units.size());
  }
  return work;
}

// Starting a thread pays for itself from about 2 us of work on.
int useful_threads(const Work& work, int threads) {
  return std::clamp(static_cast<int>(std::min(work.products / 131072.0, 1e6)), 1, std::max(threads, 1));
}

Dropout dropout_of(const MultiBatch& batch, const MultiProjection& projection, int64_t adapter) {
  if (batch.dropouts.empty() || projection.seed == nullptr) return {nullptr, 0, 1.0};
  Dropout dropout = batch.dropouts[static_cast<size_t>(adapter)];
  dropout.seed = dropout.threshold ? projection.seed : nullptr;
  return dropout;
}

// Where rows of s are kept, one for each choice of each row.
Matrix kept(const MultiBatch& batch, const MultiProjection& projection) {
  return {projection.s, projection.width, batch.x.dtype};
}

float weight_of(const MultiBatch& batch, int64_t row, int64_t choice) {
  return batch.mix ? batch.mix[row * batch.choices + choice] : 1.0f;
}

// Scratch of each thread: floats, and masks of kTileRows rows.
struct Scratch {
  int64_t size;
  Buffer<float> floats;
  Buffer<int16_t> masks;

  Scratch(int threads, int64_t size)
      : size(steps(size, 16) * 16),
        floats(allocate<float>(threads * this->size)),
        masks(allocate<int16_t>(static_cast<int64_t>(threads) * kTileRows * kMaskColumns)) {}

  float* of_thread() const { return floats.get() + omp_get_thread_num() * size; }
  int16_t* masks_of_thread() const {
    return masks.get() + static_cast<int64_t>(omp_get_thread_num()) * kTileRows * kMaskColumns;
  }
};

// Sums in float32 for a result of 16 bits to which several products are added: it is rounded once.
struct Delta {
  Matrix target, sums;
  int64_t rows, columns;
  Buffer<float> memory;

  Delta(const Matrix& target, int64_t rows, int64_t columns, bool several)
      : target(target), sums(target), rows(rows), columns(columns) {
    if (!several || target.dtype == kFloat32 || target.data == nullptr) return;
    memory = allocate<float>(rows * columns);
    std::memset(memory.get(), 0, static_cast<size_t>(rows * columns) * sizeof(float));
    sums = {memory.get(), columns, kFloat32};
  }

  // Called by every thread of a parallel region.
  void add() const {
    if (memory == nullptr) return;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row)
      PEFT_KERNELS_DISPATCH(add_floats, target, row, columns, memory.get() + row * columns);
  }
};

// ---- forward ----------------------------------------------------------------------------------------------------

void down(const MultiBatch& batch, const Choices& choices, const MultiProjection& projection, const Unit& unit, float* s,
          const Scratch& scratch) {
  const int64_t* rows = choices.rows.data() + unit.begin;
  const int count = static_cast<int>(unit.end - unit.begin);
  const int64_t ranks = ranks_of(unit), r = unit.factors.r;
  PEFT_KERNELS_DISPATCH(multi_down, batch.x, batch.k, rows, count, unit.factors.lora_A, r,
                        dropout_of(batch, projection, unit.adapter), scratch.of_thread(), scratch.masks_of_thread(), s,
                        ranks);
  for (int i = 0; i < count; ++i) {
    if (projection.s)
      PEFT_KERNELS_DISPATCH(keep_ranks, s + i * ranks, r, kept(batch, projection), rows[i] * batch.choices + unit.choice);
    PEFT_KERNELS_DISPATCH(scale_row, s + i * ranks, r, unit.factors.scaling * weight_of(batch, rows[i], unit.choice));
  }
}

// Columns [begin, end) of y. `packed` holds a tile of B.
void up(const Choices& choices, const Unit& unit, const float* s, const Matrix& y, int64_t begin, int64_t end,
        float* packed) {
  PEFT_KERNELS_DISPATCH(multi_up, s, ranks_of(unit), unit.factors.lora_B, unit.factors.r, y,
                        choices.rows.data() + unit.begin, static_cast<int>(unit.end - unit.begin), begin, end, packed);
}

// Where there are fewer units than keep all threads busy, the columns of each are cut too.
void forward_one(const MultiBatch& batch, const Choices& choices, const MultiProjection& projection, int threads) {
  const auto most = static_cast<int64_t>(choices.rows.size());
  const Work work = cut(batch, choices, projection, std::clamp<int64_t>(steps(most, 4 * threads), 12, kTileRows));
  if (work.units.empty()) return;
  threads = useful_threads(work, threads);
  const auto units = static_cast<int64_t>(work.units.size());
  const int64_t pieces = std::clamp<int64_t>(steps(4 * threads, units), 1, steps(projection.n, 2 * kTileColumns));
  const int64_t piece = whole_tiles(steps(projection.n, pieces));
  const Buffer<float> s = allocate<float>(work.s_size);
  const Scratch scratch(threads, std::max<int64_t>(kTileRows * kMaskColumns, kTileColumns * work.most_ranks));
  const Delta y(projection.y, batch.m, projection.n, batch.choices > 1);
#pragma omp parallel num_threads(threads)
  {
    int64_t begin = 0;
    for (const size_t end : work.choice_ends) {
#pragma omp for schedule(dynamic)
      for (int64_t i = begin; i < static_cast<int64_t>(end); ++i) {
        const Unit& unit = work.units[static_cast<size_t>(i)];
        down(batch, choices, projection, unit, s.get() + unit.first, scratch);
        if (pieces == 1) up(choices, unit, s.get() + unit.first, y.sums, 0, projection.n, scratch.of_thread());
      }
      if (pieces > 1) {
#pragma omp for schedule(dynamic)
        for (int64_t i = begin * pieces; i < static_cast<int64_t>(end) * pieces; ++i) {
          const Unit& unit = work.units[static_cast<size_t>(i / pieces)];
          const int64_t first = i % pieces * piece;
          up(choices, unit, s.get() + unit.first, y.sums, first, std::min(projection.n, first + piece),
             scratch.of_thread());
        }
      }
      begin = static_cast<int64_t>(end);
    }
    y.add();
  }
}

// ---- backward ---------------------------------------------------------------------------------------------------

// Rows of a backward unit: enough that its sums are a small share of its work, and no more than about 64 units beside
// one for each adapter.
int64_t rows_with_sums(int64_t choices) { return std::max<int64_t>(128, steps(choices, 64)); }

// What is wanted of one projection.
struct Wanted {
  std::vector<MultiGradient> of_adapter;
  bool grad_s = false;

  Wanted(const MultiBatch& batch, size_t projection, const std::vector<MultiGradient>& grads, bool others)
      : of_adapter(static_cast<size_t>(batch.adapters)), grad_s(others) {
    for (const MultiGradient& grad : grads)
      if (grad.projection == static_cast<int64_t>(projection)) {
        of_adapter[static_cast<size_t>(grad.adapter)] = grad;
        grad_s |= grad.grad_A != nullptr;
      }
  }
};

// Gives every unit its place among the sums, those of an adapter beside one another. Returns floats in all.
int64_t place_sums(const MultiBatch& batch, const MultiProjection& projection, const Wanted& wanted, Work& work,
                   std::vector<std::vector<size_t>>& units_of) {
  for (size_t i = 0; i < work.units.size(); ++i)
    units_of[static_cast<size_t>(work.units[i].adapter)].push_back(i);
  int64_t size = 0;
  for (size_t adapter = 0; adapter < units_of.size(); ++adapter)
    for (const size_t i : units_of[adapter]) {
      Unit& unit = work.units[i];
      unit.sum_A = wanted.of_adapter[adapter].grad_A != nullptr;
      unit.sum_B = wanted.of_adapter[adapter].grad_B != nullptr;
      unit.sums_A = size;
      size += unit.sum_A ? ranks_of(unit) * whole_tiles(batch.k) : 0;
      unit.sums_B = size;
      size += unit.sum_B ? ranks_of(unit) * whole_tiles(projection.n) : 0;
    }
  return size;
}

// The gradients of one adapter from its units' sums, for a tile of columns of A or of B.
void store_gradient(const Unit& first, int64_t parts, int64_t part_size, const MultiGradient& grad, bool down,
                    int64_t length, int64_t column, int adapter_dtype, const float* sums, float* total) {
  const int64_t ranks = ranks_of(first), r = first.factors.r;
  const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, length - column));
  for (int64_t rank = 0; rank < r; rank += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, r - rank);
    const float* at = sums + (down ? first.sums_A : first.sums_B) + column * ranks + rank * kTileColumns;
    PEFT_KERNELS_DISPATCH(total_of_parts, at, part_size, parts, count, total);
    const Matrix target{down ? grad.grad_A : grad.grad_B, down ? length : r, adapter_dtype};
    if (down) PEFT_KERNELS_DISPATCH(store_by_rank, total, count, target, rank, column, columns);
    else PEFT_KERNELS_DISPATCH(store_by_row, total, count, target, rank, column, columns, first.factors.scaling);
  }
}

// Of an adapter that no row chose.
void clear_gradient(const MultiBatch& batch, const MultiProjection& projection, const MultiGradient& grad) {
  const int64_t r = factors_of(batch, projection.layer, grad.adapter).r, size = element_size(batch.adapter_dtype);
  if (grad.grad_A) std::memset(grad.grad_A, 0, static_cast<size_t>(r * batch.k * size));
  if (grad.grad_B) std::memset(grad.grad_B, 0, static_cast<size_t>(r * projection.n * size));
}

// dS of the unit's rows, not yet scaled, to the gradients of their weights; then scaled.
void finish_ranks(const MultiBatch& batch, const MultiProjection& projection, const MultiUnit& rows, const Unit& unit,
                  float* grad_mix, float* kept_row) {
  for (int64_t i = 0; i < rows.count; ++i) {
    float* grad_s = rows.grad_s + i * rows.ranks;
    const int64_t place = rows.rows[i] * batch.choices + unit.choice;
    if (grad_mix) {
      PEFT_KERNELS_DISPATCH(kept_ranks, kept(batch, projection), place, rows.r, kept_row);
      grad_mix[place] += unit.factors.scaling * PEFT_KERNELS_DISPATCH(dot_ranks, grad_s, kept_row, rows.r);
    }
    PEFT_KERNELS_DISPATCH(scale_row, grad_s, rows.r, unit.factors.scaling * weight_of(batch, rows.rows[i], unit.choice));
  }
}

// The unit's rows of s, each times its weight.
void load_ranks(const MultiBatch& batch, const MultiProjection& projection, const MultiUnit& rows, const Unit& unit) {
  for (int64_t i = 0; i < rows.count; ++i) {
    float* s = rows.s + i * rows.ranks;
    PEFT_KERNELS_DISPATCH(kept_ranks, kept(batch, projection), rows.rows[i] * batch.choices + unit.choice, rows.r, s);
    if (batch.mix) PEFT_KERNELS_DISPATCH(scale_row, s, rows.r, weight_of(batch, rows.rows[i], unit.choice));
  }
}

void backward_one(const MultiBatch& batch, const Choices& choices, const MultiProjection& projection,
                  const Wanted& wanted, const Matrix& grad_x, float* grad_mix, int threads) {
  Work work = cut(batch, choices, projection, rows_with_sums(static_cast<int64_t>(choices.rows.size())));
  std::vector<std::vector<size_t>> units_of(static_cast<size_t>(batch.adapters));
  const int64_t sums_size = place_sums(batch, projection, wanted, work, units_of);
  threads = useful_threads(work, threads);
  const Buffer<float> sums = allocate<float>(sums_size), s = allocate<float>(2 * work.s_size);
  const int64_t packed_size = kMaskColumns * work.most_ranks, tile_size = kTileRows * kTileColumns;
  const Scratch scratch(threads, std::max<int64_t>(packed_size, kMaxRank) + tile_size);
  std::vector<int64_t> stored;
  for (const MultiGradient& grad : wanted.of_adapter)
    if (grad.grad_A || grad.grad_B) stored.push_back(grad.adapter);
  const auto rows_of = [&](const Unit& unit) {
    return MultiUnit{choices.rows.data() + unit.begin,
                     unit.end - unit.begin,
                     unit.factors.r,
                     ranks_of(unit),
                     s.get() + unit.first,
                     wanted.grad_s ? s.get() + work.s_size + unit.first : nullptr,
                     unit.sum_A ? sums.get() + unit.sums_A : nullptr,
                     unit.sum_B ? sums.get() + unit.sums_B : nullptr};
  };
  const int64_t tiles_A = steps(batch.k, kTileColumns), tiles = tiles_A + steps(projection.n, kTileColumns);
#pragma omp parallel num_threads(threads)
  {
    float *tile = scratch.of_thread(), *packed = tile + tile_size;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < static_cast<int64_t>(work.units.size()); ++i) {
      const Unit& unit = work.units[static_cast<size_t>(i)];
      const MultiUnit rows = rows_of(unit);
      if (rows.sums_B) load_ranks(batch, projection, rows, unit);
      PEFT_KERNELS_DISPATCH(multi_backward_up, rows, projection.y, projection.n, unit.factors.lora_B, packed, tile);
      if (rows.grad_s) finish_ranks(batch, projection, rows, unit, grad_mix, packed);
    }
    int64_t begin = 0;
    for (const size_t end : work.choice_ends) {
#pragma omp for schedule(dynamic)
      for (int64_t i = begin; i < static_cast<int64_t>(end); ++i) {
        const Unit& unit = work.units[static_cast<size_t>(i)];
        if (unit.sum_A || grad_x.data)
          PEFT_KERNELS_DISPATCH(multi_backward_down, rows_of(unit), batch.x, batch.k, unit.factors.lora_A,
                                dropout_of(batch, projection, unit.adapter), grad_x, packed, tile,
                                scratch.masks_of_thread());
      }
      begin = static_cast<int64_t>(end);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < static_cast<int64_t>(stored.size()) * tiles; ++i) {
      const auto adapter = static_cast<size_t>(stored[static_cast<size_t>(i / tiles)]);
      const MultiGradient& grad = wanted.of_adapter[adapter];
      const std::vector<size_t>& own = units_of[adapter];
      const bool down = i % tiles < tiles_A;
      if (own.empty()) {
        if (i % tiles == 0) clear_gradient(batch, projection, grad);
      } else if (down ? grad.grad_A : grad.grad_B) {
        const Unit& first = work.units[own[0]];
        const int64_t part_size = own.size() > 1 ? work.units[own[1]].sums_A - first.sums_A : 0;
        store_gradient(first, static_cast<int64_t>(own.size()), part_size, grad, down, down ? batch.k : projection.n,
                       (down ? i % tiles : i % tiles - tiles_A) * kTileColumns, batch.adapter_dtype, sums.get(), tile);
      }
    }
  }
}

}  // namespace

void multi_lora_forward(const MultiBatch& batch, const std::vector<MultiProjection>& projections, int threads) {
  const Choices choices(batch);
  for (const MultiProjection& projection : projections) forward_one(batch, choices, projection, threads);
}

void multi_lora_backward(const MultiBatch& batch, const std::vector<MultiProjection>& projections, Matrix grad_x,
                         float* grad_mix, const std::vector<MultiGradient>& grads, int threads) {
  const Choices choices(batch);
  const Delta total(grad_x, batch.m, batch.k, batch.choices > 1 || projections.size() > 1);
  for (size_t j = 0; j < projections.size(); ++j) {
    const Wanted wanted(batch, j, grads, grad_x.data != nullptr || grad_mix != nullptr);
    backward_one(batch, choices, projections[j], wanted, total.sums, grad_mix, threads);
  }
  if (total.memory == nullptr) return;
#pragma omp parallel num_threads(std::max(threads, 1))
  total.add();
}

}  // namespace peft_kernels
