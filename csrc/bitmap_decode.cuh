// Bits and nonzeros to the first operand of mma.m16n8k16, in registers; the host compiles all of it too (tests/csrc
// emulates a block with it). What is where: peft_kernels/formats/bitmap.py.
//
// A lane has a byte of bits for each tile of 16 x 16, which are predicates: where one is set, 2 bytes are loaded from
// the lane's even or odd stream and that stream goes on by a slot. No branches, no prefix counts; and since slots are
// 128 bytes, a lane's loads are all in its own bank of shared memory.
#pragma once

#include <cstdint>

#include "bitmap.h"
#include "nf4_decode.cuh"

namespace peft_kernels {

struct alignas(16) LaneBits {
  uint32_t words[4];  // byte i of the 16: tile i
};

// Of the even stream in the low half of a word, of the odd one in the high half: what a lane keeps in a chunk, at most
// 64 each, or sums of that over the chunks of a panel, at most 1024.
PEFT_KERNELS_HOST_DEVICE uint32_t pop_count(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(__popc(word));
#else
  return static_cast<uint32_t>(__builtin_popcount(word));
#endif
}

PEFT_KERNELS_HOST_DEVICE uint32_t stream_counts(const LaneBits& bits) {
  uint32_t even = 0, odd = 0;
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < 4; i += 2) {  // two words' bits of a stream side by side: half the counts
    const uint32_t a = bits.words[i], b = bits.words[i + 1];
    even += pop_count((a & 0x55555555u) | (b << 1 & 0xAAAAAAAAu));
    odd += pop_count((a >> 1 & 0x55555555u) | (b & 0xAAAAAAAAu));
  }
  return odd << 16 | even;
}

// What a lane keeps in the chunks of a panel that the warps from `first` to before `warp` have.
PEFT_KERNELS_HOST_DEVICE uint32_t counts_before(const uint32_t (*counts)[32], int first, int warp, int lane) {
  uint32_t sum = 0;
  for (int w = first; w < warp; ++w) sum += counts[w][lane];
  return sum;
}

// Where a lane's streams go on, in bytes of shared memory.
struct Streams {
  uint32_t even, odd;

  // `base`: of the panel's values; `before`: the counts of the panel's chunks before this one.
  PEFT_KERNELS_HOST_DEVICE Streams(uint32_t base, int lane, uint32_t before) {
    even = base + static_cast<uint32_t>(lane) * 4 + (before & 0xFFFFu) * kSlotBytes;
    odd = base + static_cast<uint32_t>(lane) * 4 + 2 + (before >> 16) * kSlotBytes;
  }
};

// The end of the longer of a lane's streams, in slots.
PEFT_KERNELS_HOST_DEVICE uint32_t last_slot(uint32_t counts) {
  return greatest(counts & 0xFFFFu, counts >> 16);
}

// The four registers of a tile from its byte, the low one of `bits`: bits 2r and 2r + 1 are the halves of register r.
// `load(address)` gives the 16 bits there.
template <class Load>
PEFT_KERNELS_HOST_DEVICE void decode_tile(uint32_t bits, Streams& streams, Load load, uint32_t (&operand)[4]) {
  PEFT_KERNELS_UNROLL
  for (int r = 0; r < 4; ++r) {
    uint32_t low = 0, high = 0;
    if (bits >> (2 * r) & 1) {
      low = load(streams.even);
      streams.even += kSlotBytes;
    }
    if (bits >> (2 * r + 1) & 1) {
      high = load(streams.odd);
      streams.odd += kSlotBytes;
    }
    operand[r] = permute_bytes(low, high, 0x5410);
  }
}

// A lane's 8 columns of x for tiles 2q and 2q + 1, counted in the chunk: of a tile the first half or the second.
PEFT_KERNELS_HOST_DEVICE int bitmap_x_column(int lane, int q) { return 32 * q + 8 * (lane & 3); }

}  // namespace peft_kernels
