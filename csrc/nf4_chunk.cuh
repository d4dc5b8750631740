// What a lane of a kernel over NF4 loads ahead, and how it becomes 16-bit weights: 32 weights of a row and 32 of the
// row 8 further down, with what their absmax values are rebuilt from.
#pragma once

#include <cstring>

#include "nf4_decode.cuh"
#include "nf4_plan.h"

namespace peft_kernels {

constexpr int kMapBytes = 256 * 4;  // the map of double quantisation, in shared memory behind the pair table
// What a kernel is compiled for: aligned rows (rows_are_aligned) with plain absmax or double quantisation, and any
// rows.
enum Rows { kPlainRows, kNestedRows, kAnyRows };

constexpr uint32_t kZeroWord = 0x77777777u;

// The packed bytes as words: `words` is at or up to 3 bytes before them, so that element e is number e + skipped in it.
// And of rows that are aligned their length in memory.
struct PackedWords {
  const uint32_t* words;
  int skipped;
  int rest;            // bytes behind the last whole word
  int64_t whole;       // words of which every byte is there
  uint32_t last_word;  // the one that is there in part: set on the device
  uint32_t row_bytes, row_parts;  // of 32 weights
  int part_shift;      // 1 << part_shift such parts are a block

  PEFT_KERNELS_HOST_DEVICE void read_last_word() {
    last_word = kZeroWord;
    const auto* bytes = reinterpret_cast<const uint8_t*>(words + whole);
    PEFT_KERNELS_UNROLL
    for (int b = 2; b >= 0; --b)
      if (b < rest) last_word = last_word << 8 | bytes[b];
  }
};

inline PackedWords packed_words(const Nf4Weight& q, int64_t bytes) {
  const int64_t before = reinterpret_cast<uintptr_t>(q.packed) % 4, all = bytes + before;
  const auto stride = static_cast<uint32_t>(q.row_stride);
  return {reinterpret_cast<const uint32_t*>(q.packed - before), static_cast<int>(2 * before), static_cast<int>(all % 4),
          all / 4, kZeroWord, stride / 2, stride / kLaneWeights, q.shift - 5};
}

// A number that no kernel writes while this one runs.
template <class T>
PEFT_KERNELS_HOST_DEVICE T load_constant(const T* address) {
#if defined(__CUDA_ARCH__)
  return __ldg(address);
#else
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
#endif
}

// 16 bytes that only this lane reads.
PEFT_KERNELS_HOST_DEVICE void load_once(const uint8_t* address, uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(address));
#else
  std::memcpy(words, address, sizeof words);
#endif
}

// An absmax as it is in memory: its bits, or with double quantisation an index and the absmax of its group.
template <Rows kind>
struct PackedScale {
  uint32_t bits;
  float group;

  static PEFT_KERNELS_HOST_DEVICE bool nested(const Nf4Weight& q) {
    return kind == kNestedRows || (kind == kAnyRows && q.nested_absmax != nullptr);
  }

  PEFT_KERNELS_HOST_DEVICE void load(const Nf4Weight& q, int64_t block) {
    if (nested(q)) {
      bits = load_constant(static_cast<const uint8_t*>(q.absmax) + block);
      group = load_constant(q.nested_absmax + (block >> kNf4NestedShift));
    } else {
      bits = load_constant(static_cast<const uint32_t*>(q.absmax) + block);
    }
  }

  PEFT_KERNELS_HOST_DEVICE float value(const Nf4Weight& q, const float* map, float offset) const {
    return nested(q) ? nested_absmax(map[bits], group, offset) : bits_to_float(bits);
  }
};

// The element at a lane's row of its warp's first unit and at its column: from here it counts rows down. Rows below the
// last are the last once more: their sums are not stored. So are, of aligned rows, columns past K: their weights are
// made 0 by their absmax.
template <Rows kind>
struct Origin {
  const uint8_t* bytes;
  uint32_t part;  // number of the 32 weights in the flattened whole
  uint32_t rows_below;

  PEFT_KERNELS_HOST_DEVICE Origin(const Nf4Weight& q, const PackedWords&, int row, int column) {
    const int last = static_cast<int>(q.n) - 1;
    row = least(row, last);
    const int64_t element = element_number(q, row, least(column, static_cast<int>(q.k) - kLaneWeights));
    bytes = q.packed + (element >> 1);
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+l"(bytes));  // or each row's address would be counted from `packed` anew
#endif
    part = static_cast<uint32_t>(element >> 5);
    rows_below = static_cast<uint32_t>(last - row);
  }
};

template <>
struct Origin<kAnyRows> {
  int64_t element;
  uint32_t rows_below;
  int count;  // of the 32 weights, those before the row's end
  uint32_t last_word;

  PEFT_KERNELS_HOST_DEVICE Origin(const Nf4Weight& q, const PackedWords& packed, int row, int column)
      : last_word(packed.last_word) {
    const int last = static_cast<int>(q.n) - 1;
    row = least(row, last);
    count = least(greatest(static_cast<int>(q.k) - column, 0), kLaneWeights);
    element = element_number(q, row, column);
    rows_below = static_cast<uint32_t>(last - row);
  }
};

template <Rows kind>
struct Chunk {
  uint32_t words[2][4];
  PackedScale<kind> scales[2];

  PEFT_KERNELS_HOST_DEVICE void load(const Nf4Weight& q, const PackedWords& packed, const Origin<kind>& origin,
                                       uint32_t row) {
    PEFT_KERNELS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t down = least(row + 8u * h, origin.rows_below);
      load_once(origin.bytes + static_cast<uint64_t>(down) * packed.row_bytes, words[h]);
      scales[h].load(q, (origin.part + down * packed.row_parts) >> packed.part_shift);
    }
  }
};

template <>
struct Chunk<kAnyRows> {
  uint32_t words[2][5];
  uint32_t cut[2];  // of each row: first element in its words, elements left in the block, elements left in the row
  PackedScale<kAnyRows> scales[2], next_scales[2];

  PEFT_KERNELS_HOST_DEVICE int skip(int h) const { return static_cast<int>(cut[h] & 7); }
  PEFT_KERNELS_HOST_DEVICE int edge(int h) const { return static_cast<int>(cut[h] >> 8 & 0xFF); }
  PEFT_KERNELS_HOST_DEVICE int count(int h) const { return static_cast<int>(cut[h] >> 16); }

  PEFT_KERNELS_HOST_DEVICE void load(const Nf4Weight& q, const PackedWords& packed, const Origin<kAnyRows>& origin,
                                       uint32_t row) {
    PEFT_KERNELS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t down = least(row + 8u * h, origin.rows_below);
      const int64_t element = origin.element + static_cast<int64_t>(down) * q.row_stride, at = element + packed.skipped;
      const int count = origin.count, skip = static_cast<int>(at & 7), edge = left_in_block(element, q.shift);
      cut[h] = static_cast<uint32_t>(count << 16 | edge << 8 | skip);
      scales[h] = next_scales[h] = {0, 0.0f};
      if (count > 0) scales[h].load(q, element >> q.shift);
      if (edge < count) next_scales[h].load(q, (element >> q.shift) + 1);
      const int64_t first = at >> 3;
      PEFT_KERNELS_UNROLL
      for (int i = 0; i < 5; ++i) {
        words[h][i] = origin.last_word;
        if (8 * i < skip + count && first + i < packed.whole) words[h][i] = load_constant(packed.words + first + i);
      }
    }
  }
};

// A chunk with its absmax values rebuilt, to be decoded word by word into pairs of the upper and the lower row.
template <int dtype, Rows kind>
class DecodedRows {
 public:
  // Weights that are not `live` become 0. With `planes` the lower row is decoded by byte planes: that takes load off
  // shared memory.
  PEFT_KERNELS_HOST_DEVICE DecodedRows(const Chunk<kind>& chunk, const Nf4Weight& q, const float* map, float offset,
                                         bool live, bool planes)
      : chunk_(chunk), planes_(planes) {
    PEFT_KERNELS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float scale = chunk.scales[h].value(q, map, offset);
      scales_[h] = live ? scale : 0.0f;
    }
    if (planes) lower_ = byte_planes<dtype>(scales_[1]);
  }

  PEFT_KERNELS_HOST_DEVICE void decode(const char* table, int lane, int i, uint32_t (&upper)[4],
                                         uint32_t (&lower)[4]) const {
    decode_by_table<dtype>(table, chunk_.words[0][i], lane, scales_[0], upper);
    if (planes_) decode_by_planes<dtype>(lower_, chunk_.words[1][i], lower);
    else decode_by_table<dtype>(table, chunk_.words[1][i], lane, scales_[1], lower);
  }

 private:
  const Chunk<kind>& chunk_;
  const bool planes_;
  float scales_[2];
  BytePlanes lower_;
};

template <int dtype>
class DecodedRows<dtype, kAnyRows> {
 public:
  PEFT_KERNELS_HOST_DEVICE DecodedRows(const Chunk<kAnyRows>& chunk, const Nf4Weight& q, const float* map,
                                         float offset, bool, bool)
      : chunk_(chunk) {
    PEFT_KERNELS_UNROLL
    for (int h = 0; h < 2; ++h) {
      scales_[h] = chunk.scales[h].value(q, map, offset);
      next_scales_[h] = chunk.next_scales[h].value(q, map, offset);
      cut_words(chunk.words[h], chunk.skip(h), chunk.count(h), words_[h]);
    }
  }

  PEFT_KERNELS_HOST_DEVICE void decode(const char* table, int lane, int i, uint32_t (&upper)[4],
                                         uint32_t (&lower)[4]) const {
    decode_row(table, lane, i, 0, upper);
    decode_row(table, lane, i, 1, lower);
  }

 private:
  PEFT_KERNELS_HOST_DEVICE void decode_row(const char* table, int lane, int i, int h, uint32_t (&pairs)[4]) const {
    decode_across<dtype>(table, words_[h][i], lane, i, scales_[h], next_scales_[h], chunk_.edge(h),
                                   pairs);
  }

  const Chunk<kAnyRows>& chunk_;
  uint32_t words_[2][4];
  float scales_[2], next_scales_[2];
};

}  // namespace peft_kernels
