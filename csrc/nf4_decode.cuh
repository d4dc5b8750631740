// NF4 in registers: bytes to pairs of 16-bit weights, and where each lane finds its bytes, its block and its results.
// The host compiles all of it too (tests/csrc emulates a warp with it); nothing here needs CUDA's headers on the host.
//
// A weight is round(code * absmax), one float32 product and one rounding, in every form below.
//
// A 32-bit word holds 8 weights e0..e7 of a row, byte j the pair (e2j, e2j+1), the earlier in the high half. Two forms:
//   pair table   256 entries (code of the high half, code of the low half) of 8 bytes, one copy for each lane, so that
//                no two lanes meet in a bank: 64 KiB of shared memory. An entry stands 256 bytes after the one before,
//                so that one byte permutation makes the address: 2.5 instructions a weight, bound by shared memory.
//   byte planes  the 16 products of a block, their low and high bytes in four registers each, looked up by byte
//                permutations: no memory, bound by the integer units; 32 instructions for the table of a block.
#pragma once

#include <cstdint>

#include "device_numeric.h"
#include "nf4.h"

namespace peft_kernels {

constexpr int kLaneWeights = 32;                    // of a row, that a lane takes at once: 16 bytes
constexpr int kStepColumns = 4 * kLaneWeights;      // of a warp: the four lanes of a row side by side
constexpr int kUnitRows = 16;                       // of a warp: lane / 4, and 8 rows further down
constexpr int kPairTableBytes = 256 * 32 * 8;

// Device code cannot use a constant array of the host's, but its elements.
#define PEFT_KERNELS_NF4_CODES                                                                                     \
  kNf4Code[0], kNf4Code[1], kNf4Code[2], kNf4Code[3], kNf4Code[4], kNf4Code[5], kNf4Code[6], kNf4Code[7],          \
      kNf4Code[8], kNf4Code[9], kNf4Code[10], kNf4Code[11], kNf4Code[12], kNf4Code[13], kNf4Code[14], kNf4Code[15]

PEFT_KERNELS_HOST_DEVICE float nf4_code(int index) {
  constexpr float code[16] = {PEFT_KERNELS_NF4_CODES};
  return code[index];
}

// Products and sums that are never contracted to one rounding.
PEFT_KERNELS_HOST_DEVICE float multiply_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PEFT_KERNELS_HOST_DEVICE float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// The absmax of a block of double quantisation.
PEFT_KERNELS_HOST_DEVICE float nested_absmax(float mapped, float group, float offset) {
  return add_rn(multiply_rn(mapped, group), offset);
}

// PRMT: bytes of (a, b) by the four selector halves of `selector`, bit 3 (replicate the sign) clear.
PEFT_KERNELS_HOST_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;  // __byte_perm would mask the selector
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#else
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t source = selector >> (4 * i) & 7;
    result |= static_cast<uint32_t>(bytes >> (8 * source) & 0xFF) << (8 * i);
  }
  return result;
#endif
}

struct alignas(8) CodePair {
  float first, second;
};

PEFT_KERNELS_HOST_DEVICE CodePair code_pair(int byte) { return {nf4_code(byte >> 4), nf4_code(byte & 15)}; }

// Where lane `lane` finds the entry of byte `j` of a word in the pair table, in bytes.
PEFT_KERNELS_HOST_DEVICE uint32_t pair_offset(uint32_t word, int j, uint32_t lane) {
  return permute_bytes(word, lane * 8, 0x7704u | j << 4);
}

template <int dtype>
PEFT_KERNELS_HOST_DEVICE uint32_t scaled(CodePair pair, float first_scale, float second_scale) {
  return pack<dtype>(multiply_rn(pair.first, first_scale), multiply_rn(pair.second, second_scale));
}

// The pairs of a word by the pair table, all in one block.
template <int dtype>
PEFT_KERNELS_HOST_DEVICE void decode_by_table(const char* table, uint32_t word, uint32_t lane, float scale,
                                              uint32_t (&pairs)[4]) {
  PEFT_KERNELS_UNROLL
  for (int j = 0; j < 4; ++j) {
    const CodePair pair = *reinterpret_cast<const CodePair*>(table + pair_offset(word, j, lane));
    pairs[j] = scaled<dtype>(pair, scale, scale);
  }
}

// The 16 products of a block: bytes 4i to 4i + 3 of the low and of the high plane in low[i] and high[i].
struct BytePlanes {
  uint32_t low[4], high[4];
};

template <int dtype>
PEFT_KERNELS_HOST_DEVICE BytePlanes byte_planes(float scale) {
  BytePlanes planes;
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t a = scaled<dtype>({nf4_code(4 * i), nf4_code(4 * i + 1)}, scale, scale);
    const uint32_t b = scaled<dtype>({nf4_code(4 * i + 2), nf4_code(4 * i + 3)}, scale, scale);
    planes.low[i] = permute_bytes(a, b, 0x6420);
    planes.high[i] = permute_bytes(a, b, 0x7531);
  }
  return planes;
}

template <int dtype>
PEFT_KERNELS_HOST_DEVICE void decode_by_planes(const BytePlanes& planes, uint32_t word, uint32_t (&pairs)[4]) {
  uint32_t select = word & 0x77777777u, half = ((word >> 1) & 0x44444444u) | 0x32103210u;
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < 2; ++i) {  // PRMT reads the low 16 bits of a selector: four weights at a time
    const uint32_t low = permute_bytes(permute_bytes(planes.low[0], planes.low[1], select),
                                       permute_bytes(planes.low[2], planes.low[3], select), half);
    const uint32_t high = permute_bytes(permute_bytes(planes.high[0], planes.high[1], select),
                                        permute_bytes(planes.high[2], planes.high[3], select), half);
    pairs[2 * i] = permute_bytes(low, high, 0x4051);
    pairs[2 * i + 1] = permute_bytes(low, high, 0x6273);
    select >>= 16;
    half >>= 16;
  }
}

// Rows that begin anywhere: a lane's 32 weights are cut from five words that begin at a multiple of 8 elements.

PEFT_KERNELS_HOST_DEVICE uint32_t swap_halves(uint32_t word) {
  return (word >> 4 & 0x0F0F0F0Fu) | (word & 0x0F0F0F0Fu) << 4;
}

PEFT_KERNELS_HOST_DEVICE uint32_t shift_right(uint32_t low, uint32_t high, int bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, bits);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
#endif
}

// A word with code 0 from element `keep` on: past a row's end, where x counts as 0, weights must not become infinite.
PEFT_KERNELS_HOST_DEVICE uint32_t keep_first(uint32_t word, int keep) {
  if (keep >= 8) return word;
  const uint32_t kept = keep <= 0 ? 0u : swap_halves((1u << 4 * keep) - 1);
  return (word & kept) | (0x77777777u & ~kept);
}

// A lane's 32 weights from five words, `skip` (0..7) elements into the first, with code 0 from element `count` on. An
// odd number of elements is cut from words whose elements rise from the lowest bits.
PEFT_KERNELS_HOST_DEVICE void cut_words(const uint32_t (&words)[5], int skip, int count, uint32_t (&cut)[4]) {
  uint32_t source[5];
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < 5; ++i) source[i] = skip % 2 == 0 ? words[i] : swap_halves(words[i]);
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < 4; ++i) {
    cut[i] = shift_right(source[i], source[i + 1], 4 * skip);
    if (skip % 2 != 0) cut[i] = swap_halves(cut[i]);
  }
  if (count >= kLaneWeights) return;
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < 4; ++i) cut[i] = keep_first(cut[i], count - 8 * i);
}

// The pairs of word `i` of a lane's 32 weights, of which those from `edge` on are in the next block.
template <int dtype>
PEFT_KERNELS_HOST_DEVICE void decode_across(const char* table, uint32_t word, uint32_t lane, int i, float scale,
                                            float next_scale, int edge, uint32_t (&pairs)[4]) {
  PEFT_KERNELS_UNROLL
  for (int j = 0; j < 4; ++j) {
    const CodePair pair = *reinterpret_cast<const CodePair*>(table + pair_offset(word, j, lane));
    const int at = 8 * i + 2 * j;
    pairs[j] = scaled<dtype>(pair, at < edge ? scale : next_scale, at + 1 < edge ? scale : next_scale);
  }
}

// mma.m16n8k16 takes 16 rows of the weight as its first operand. Within a lane's word the columns are permuted, alike
// for weight and x, so that the lane multiplies what it loaded:
//   first product   a0 = row (e0, e1), a1 = row + 8 (e0, e1), a2 = row (e2, e3), a3 = row + 8 (e2, e3)
//   second product  the same with e4..e7;  b0, b1 = x of token lane / 4 at the same columns
PEFT_KERNELS_HOST_DEVICE void first_operand(const uint32_t (&upper)[4], const uint32_t (&lower)[4], int product,
                                            uint32_t (&a)[4]) {
  a[0] = upper[2 * product];
  a[1] = lower[2 * product];
  a[2] = upper[2 * product + 1];
  a[3] = lower[2 * product + 1];
}
PEFT_KERNELS_HOST_DEVICE int lane_row(int lane) { return lane >> 2; }              // and 8 rows further down
PEFT_KERNELS_HOST_DEVICE int lane_column(int lane) { return (lane & 3) * kLaneWeights; }
PEFT_KERNELS_HOST_DEVICE int lane_token(int lane) { return lane >> 2; }            // of x
// Of accumulator `i` (0..3):
PEFT_KERNELS_HOST_DEVICE int result_row(int lane, int i) { return (lane >> 2) + 8 * (i >> 1); }
PEFT_KERNELS_HOST_DEVICE int result_token(int lane, int i) { return (lane & 3) * 2 + (i & 1); }

PEFT_KERNELS_HOST_DEVICE int64_t element_number(const Nf4Weight& q, int64_t row, int64_t column) {
  return q.first + row * q.row_stride + column;
}

// Elements from number `element` to the end of its block, at most `kLaneWeights`.
PEFT_KERNELS_HOST_DEVICE int left_in_block(int64_t element, int shift) {
  const int left = (1 << shift) - static_cast<int>(element & ((1 << shift) - 1));
  return left < kLaneWeights ? left : kLaneWeights;
}

// Whether the kernels' indices hold: 64 bits for elements, 32 for rows, columns and aligned parts of 32 elements.
inline bool nf4_fits(const Nf4Weight& q) {
  constexpr int64_t most = 0x7FFFFFFF - 0xFFFF;  // tiles past the end are counted too
  if (q.n < 1 || q.k < 1 || q.first < 0 || q.row_stride < 0) return false;
  if (q.n > most || q.k > most || q.row_stride > most) return false;
  return (q.first + (q.n - 1) * q.row_stride + q.k) / kLaneWeights <= most;
}

// A lane's 32 weights never cross a block, and their bytes begin at a multiple of 16, where this holds.
inline bool rows_are_aligned(const Nf4Weight& q) {
  const bool starts = q.first % kLaneWeights == 0 && (q.n <= 1 || q.row_stride % kLaneWeights == 0);
  return starts && q.k % kLaneWeights == 0 && reinterpret_cast<uintptr_t>(q.packed) % 16 == 0;
}

}  // namespace peft_kernels
