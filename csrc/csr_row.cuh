// A thread's part of a row of W, group by group; the host compiles all of it too (tests/csrc emulates a block with it).
// What is where: peft_kernels/formats/csr.py.
#pragma once

#include <cstdint>

#include "csr.h"
#include "device_numeric.h"

namespace peft_kernels {

struct CsrGroup {
  uint32_t values[4], columns[4];  // two to a word, the earlier one in the low half
};

// Words of a column of `rows` rows of x in shared memory: one float, or 16-bit numbers two to a word.
template <int rows>
constexpr int kCsrColumnWords = rows <= 2 ? 1 : rows / 2;

template <int rows>
struct CsrColumn {
  uint32_t words[kCsrColumnWords<rows>];
};

PEFT_KERNELS_HOST_DEVICE uint32_t csr_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return float_bits(value);
#endif
}

// Two columns of x, of words [row] that hold both.
template <int dtype, int rows>
PEFT_KERNELS_HOST_DEVICE void csr_columns(const uint32_t (&pairs)[rows], CsrColumn<rows>& even, CsrColumn<rows>& odd) {
  if constexpr (rows == 1) {
    even.words[0] = csr_bits(low_half<dtype>(pairs[0]));
    odd.words[0] = csr_bits(high_half<dtype>(pairs[0]));
  } else {
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < rows / 2; ++i) {
      even.words[i] = (pairs[2 * i] & 0xFFFFu) | pairs[2 * i + 1] << 16;
      odd.words[i] = pairs[2 * i] >> 16 | (pairs[2 * i + 1] & 0xFFFF0000u);
    }
  }
}

// The number of a row in a column.
template <int dtype, int rows>
PEFT_KERNELS_HOST_DEVICE float csr_x(const CsrColumn<rows>& column, int row) {
  if constexpr (rows == 1) return bits_to_float(column.words[0]);
  else return row % 2 == 0 ? low_half<dtype>(column.words[row / 2]) : high_half<dtype>(column.words[row / 2]);
}

// sums [rows] += a group's 8 numbers times the columns of x that load(column) finds.
template <int dtype, int rows, class Number, class Load>
PEFT_KERNELS_HOST_DEVICE void csr_multiply(const CsrGroup& group, Load load, Number (&sums)[rows]) {
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < kCsrGroup; ++i) {
    const uint32_t pair = group.columns[i / 2], value = group.values[i / 2];
    const CsrColumn<rows> column = load(i % 2 == 0 ? pair & 0xFFFFu : pair >> 16);
    const float weight = i % 2 == 0 ? low_half<dtype>(value) : high_half<dtype>(value);
    PEFT_KERNELS_UNROLL
    for (int row = 0; row < rows; ++row)
      sums[row] += static_cast<Number>(weight) * static_cast<Number>(csr_x<dtype, rows>(column, row));
  }
}

// The groups of a row that are a thread's: at, at + stride, ... before end. The next two are on their way.
struct CsrRun {
  int64_t at, end;
  int stride;
  CsrGroup next[2];

  template <class Fetch>
  PEFT_KERNELS_HOST_DEVICE void fetch_into(int which, int64_t group, Fetch fetch) {
    if (group < end) next[which] = fetch(group);
  }

  template <class Fetch>
  PEFT_KERNELS_HOST_DEVICE void begin(int64_t first, int64_t last, int lane, int of, Fetch fetch) {
    at = first + lane;
    end = last;
    stride = of;
    fetch_into(0, at, fetch);
    fetch_into(1, at + stride, fetch);
  }

  template <int dtype, int rows, class Number, class Fetch, class Load>
  PEFT_KERNELS_HOST_DEVICE void multiply(Fetch fetch, Load load, Number (&sums)[rows]) {
    for (; at < end; at += 2 * stride) {
      csr_multiply<dtype, rows>(next[0], load, sums);
      fetch_into(0, at + 2 * stride, fetch);
      if (at + stride < end) csr_multiply<dtype, rows>(next[1], load, sums);
      fetch_into(1, at + 3 * stride, fetch);
    }
  }
};

// Sums over the lanes that share a row of W: each half of the lanes takes half of the rows of x from the other, so that
// the tree of a row's sum is the same however many rows there are. A lane sends what the lane `offset` away keeps.
template <int count, class Number>
PEFT_KERNELS_HOST_DEVICE Number csr_sent(const Number* sums, int i, bool upper) {
  return upper ? sums[i] : sums[i + count / 2];
}
template <int count, class Number>
PEFT_KERNELS_HOST_DEVICE Number csr_kept(const Number* sums, int i, bool upper) {
  return upper ? sums[i + count / 2] : sums[i];
}

// The row of x whose sum a lane is left with, of the lanes [0, lanes) of a row of W; one in lanes / rows stores it.
PEFT_KERNELS_HOST_DEVICE int csr_row_left(int lane, int lanes, int rows) { return lane / (lanes / rows); }
PEFT_KERNELS_HOST_DEVICE bool csr_stores(int lane, int lanes, int rows) { return lane % (lanes / rows) == 0; }

}  // namespace peft_kernels
