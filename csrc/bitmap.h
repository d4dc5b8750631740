// A pruned weight as bits and nonzeros (peft_kernels/formats/bitmap.py says what is where), and how a GPU divides
// y = x W^T among its blocks: a function of the weight's shape, its largest panel and the GPU alone, so that a row has
// the same bits whatever else is in its batch.
#pragma once

#include <cstdint>

#include "host_device.h"

#if defined(__CUDACC__)
#define PEFT_KERNELS_NO_UNROLL _Pragma("unroll 1")
#else
#define PEFT_KERNELS_NO_UNROLL
#endif

namespace peft_kernels {

constexpr int kBitmapRows = 16;         // of a strip
constexpr int kBitmapColumns = 256;     // of a chunk, which a warp takes at once
constexpr int kBitmapChunkBytes = 512;  // of bits, 16 for each lane
constexpr int kPanelChunks = 16;        // at most
constexpr int kBitmapWarps = 8;         // of a block, at most
constexpr int kTurns = 2;               // chunks that a warp takes one after the other, at most
constexpr int kBitmapTokens = 8;
constexpr int kSlotBytes = 128;         // an element of each of the 64 streams
constexpr int kMostSlots = kPanelChunks * kBitmapColumns / 4;  // of a panel: a stream has a weight in four columns
constexpr int kMostSplits = 8;          // blocks of a cluster that every GPU with clusters can run

// Slots of `values` begin at multiples of 16 bytes.
struct BitmapWeight {
  int64_t n, k;
  int panels, most_slots;
  const void* values;
  const void* bits;
  const int32_t* starts;
  const int32_t* order;
};

PEFT_KERNELS_HOST_DEVICE int64_t bitmap_parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

struct BitmapGpu {
  int multiprocessors, shared_bytes;  // the most that a block may have
  bool clusters;
};

// A block takes `groups` strips with a warp for each `turns` chunks of a panel: what a warp does but once is shared by
// more weights, where there are blocks enough to keep the multiprocessors busy with fewer warps. It walks every
// `splits`-th panel: the blocks of a cluster share a strip's panels out. Warps stand as [width, groups], blocks as
// [tiles, splits]: nothing is divided on the device.
struct BitmapPlan {
  int strips, chunks, panels;
  int panel_chunks;
  int turns, width;  // chunks of a warp, warps of a group
  int groups, splits, tiles, threads;
  int group_bytes;  // of shared memory, for a panel's values
  int shared_bytes;
};

// In shared memory the warps' sums come where the values were: for each of 8 tokens 16 rows, a stride apart for which
// no two lanes of a warp meet in a bank.
constexpr int kBitmapTokenStride = 20;
constexpr int kBitmapSums = kBitmapTokens * kBitmapTokenStride;

// Whether the kernel's indices hold.
inline bool bitmap_fits(const BitmapWeight& w) {
  constexpr int64_t most = 0x7FFF0000;
  if (w.n < 1 || w.k < 1 || w.n > most || w.k > most || w.panels < 1) return false;
  const int64_t strips = bitmap_parts(w.n, kBitmapRows), chunks = bitmap_parts(w.k, kBitmapColumns);
  const int64_t width = bitmap_parts(chunks, w.panels);
  if (width > kPanelChunks || (w.panels - 1) * width >= chunks) return false;  // no panel may be empty
  return strips * w.panels < most && w.most_slots >= 0 && w.most_slots <= kMostSlots;
}

// Of a weight that fits. A `shared_bytes` above the GPU's says that it has too little for the largest panel.
inline BitmapPlan bitmap_plan(const BitmapWeight& w, const BitmapGpu& gpu) {
  BitmapPlan plan{};
  plan.strips = static_cast<int>(bitmap_parts(w.n, kBitmapRows));
  plan.chunks = static_cast<int>(bitmap_parts(w.k, kBitmapColumns));
  plan.panels = w.panels;
  plan.panel_chunks = static_cast<int>(bitmap_parts(plan.chunks, plan.panels));
  const bool many = plan.panel_chunks > 1 && 2 * static_cast<int64_t>(plan.strips) >= 3 * gpu.multiprocessors;
  plan.turns = many || plan.panel_chunks > kBitmapWarps ? kTurns : 1;
  plan.width = static_cast<int>(bitmap_parts(plan.panel_chunks, plan.turns));
  // Narrow panels share a block where there are strips enough for all multiprocessors.
  plan.groups = kBitmapWarps / plan.width;
  const int shares = plan.strips / gpu.multiprocessors;
  if (plan.groups > shares) plan.groups = shares > 1 ? shares : 1;
  plan.tiles = static_cast<int>(bitmap_parts(plan.strips, plan.groups));
  plan.splits = 1;
  while (gpu.clusters && plan.splits < kMostSplits && plan.splits * 2 <= plan.panels &&
         static_cast<int64_t>(plan.tiles) * plan.splits * 2 < static_cast<int64_t>(gpu.multiprocessors) * 3)
    plan.splits *= 2;
  plan.threads = 32 * plan.width * plan.groups;
  plan.group_bytes = w.most_slots * kSlotBytes;
  const int values = plan.groups * plan.group_bytes, sums = plan.width * plan.groups * kBitmapSums * 4;
  plan.shared_bytes = values > sums ? values : sums;
  return plan;
}

// What a warp takes, of warps [width, groups] in blocks [tiles, splits].
struct BitmapShare {
  int group, warp;   // of its block, and in its group
  int warp_of_block;
  int strip;         // may be past the last
  int first_panel;

  PEFT_KERNELS_HOST_DEVICE BitmapShare(const BitmapPlan& plan, int tile, int split, int group, int warp)
      : group(group), warp(warp), warp_of_block(group * plan.width + warp), strip(tile * plan.groups + group),
        first_panel(split) {}

  // Of the warp's chunks in a panel the first, and how many there are.
  PEFT_KERNELS_HOST_DEVICE int chunk(const BitmapPlan& plan, int panel) const {
    return panel * plan.panel_chunks + warp * plan.turns;
  }
  PEFT_KERNELS_HOST_DEVICE int turns(const BitmapPlan& plan, int panel) const {
    const int last = (panel + 1) * plan.panel_chunks, end = last < plan.chunks ? last : plan.chunks;
    const int left = strip < plan.strips ? end - chunk(plan, panel) : 0;
    return left < plan.turns ? left : plan.turns;  // below 0 where the panel ends before
  }
};

// The slots of a panel arrive in ranges, in this order: a warp waits for those up to its last slot.
constexpr int kBitmapRanges = 8;
PEFT_KERNELS_HOST_DEVICE int range_slots(int slots) { return (slots + kBitmapRanges - 1) / kBitmapRanges; }

// Whether a panel's slots [0, end) reach into a range.
PEFT_KERNELS_HOST_DEVICE bool needs_range(int end, int slots, int range) { return range * range_slots(slots) < end; }

// Bytes of a panel's values.
struct BitmapRange {
  int begin, end;
};
PEFT_KERNELS_HOST_DEVICE BitmapRange range_of(int slots, int range) {
  const int each = range_slots(slots), end = (range + 1) * each, begin = range * each;
  return {(begin < slots ? begin : slots) * kSlotBytes, (end < slots ? end : slots) * kSlotBytes};
}

// Calls copy(byte) for each 16 bytes of a panel's values that a thread of a group is to ask for, arrive(range) behind
// those of each range.
template <class Copy, class Arrive>
PEFT_KERNELS_HOST_DEVICE void copy_panel(int slots, int threads, int thread, Copy copy, Arrive arrive) {
  PEFT_KERNELS_NO_UNROLL
  for (int range = 0; range < kBitmapRanges; ++range) {
    const BitmapRange bytes = range_of(slots, range);
    PEFT_KERNELS_NO_UNROLL
    for (int at = bytes.begin + 16 * thread; at < bytes.end; at += 16 * threads) copy(at);
    arrive(range);
  }
}

// Where a warp leaves the sum of a row and a token, in floats.
PEFT_KERNELS_HOST_DEVICE int bitmap_sum_offset(int warp_of_block, int token, int row) {
  return warp_of_block * kBitmapSums + token * kBitmapTokenStride + row;
}

// Sum number `i` of those that a block makes, 16 rows · groups · m in all.
struct BitmapSum {
  int group, token, row;

  PEFT_KERNELS_HOST_DEVICE BitmapSum(const BitmapPlan& plan, int i) {
    row = i % kBitmapRows;
    group = i / kBitmapRows % plan.groups;
    token = i / (kBitmapRows * plan.groups);
  }

  // Over the warps of the group, in their order.
  template <class Number>
  PEFT_KERNELS_HOST_DEVICE Number over_warps(const BitmapPlan& plan, const Number* sums) const {
    Number sum = 0;
    for (int w = 0; w < plan.width; ++w) sum += sums[bitmap_sum_offset(group * plan.width + w, token, row)];
    return sum;
  }
};

}  // namespace peft_kernels
