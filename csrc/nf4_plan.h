// How the GPU divides y = x W^T with W in 4 bits and at most 16 rows of x: a function of the weight's shape and the GPU
// alone, so that a row has the same bits whatever else is in its batch.
//
// A block of 8 warps takes a tile of `units` times 16 rows of W and one of `splits` ranges of K, cut into steps of 128
// columns. Its warps form `groups` that share the units out; the 8 / groups warps of a group take the steps in turn.
// Sums go over the warps of a group in their order, then over the splits, which are the blocks of a cluster, in theirs.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace peft_kernels {

constexpr int kMaxTokens = 16;
constexpr int kPlanWarps = 8;
constexpr int kGroupUnits = 4;  // accumulated by a warp at once
constexpr int kPlanRows = 16;
constexpr int kPlanColumns = 128;
constexpr int kMaxUnits = 16;
constexpr int kClusterSizes = 4;  // 1, 2, 4 and 8 blocks: what every GPU that has clusters can run

// How many clusters of 1 << i blocks a GPU runs at once; 0 where it runs none of that size.
struct ClustersAtOnce {
  int count[kClusterSizes];
};

struct Nf4Plan {
  int units, groups, splits;
  int steps, steps_per_split;
  int tiles;
  int blocks;  // of the grid; each walks tiles until none is left
};

PEFT_KERNELS_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Clocks of a multiprocessor for its share: the slowest of shared memory (one access for each weight of a lane), of a
// warp's own instructions and of the transfer of weight and x from the L2 cache, as modelled, not measured.
inline int64_t plan_clocks(int64_t steps_per_split, int units, int groups, int splits) {
  const int64_t turns = divide_up(steps_per_split, kPlanWarps / groups);
  const int64_t table = 64 * units * steps_per_split, warp = 260 * divide_up(units, groups) * turns;
  const int64_t bytes_per_step = units * kPlanRows * kPlanColumns / 2 + 8 * kPlanColumns * 2;
  const int64_t transfer = bytes_per_step * steps_per_split / 23;
  int64_t slowest = table > warp ? table : warp;
  if (transfer > slowest) slowest = transfer;
  return slowest + 600 + (splits > 1 ? 1200 : 0);
}

inline Nf4Plan nf4_plan(int64_t n, int64_t k, const ClustersAtOnce& clusters) {
  const int64_t steps = divide_up(k, kPlanColumns), row_units = divide_up(n, kPlanRows);
  Nf4Plan best{};
  int64_t least = -1;
  for (int size = 0; size < kClusterSizes; ++size) {
    const int splits = 1 << size;
    const int64_t steps_per_split = divide_up(steps, splits), at_once = clusters.count[size];
    if (at_once == 0 || (splits > 1 && steps_per_split * (splits - 1) >= steps)) continue;  // a range would be empty
    for (int groups = 1; groups <= kPlanWarps; groups *= 2) {
      for (int units = groups; units <= groups * kGroupUnits && units <= kMaxUnits; ++units) {
        const int64_t tiles = divide_up(row_units, units), rounds = divide_up(tiles, at_once);
        const int64_t clocks = rounds * plan_clocks(steps_per_split, units, groups, splits);
        if (least >= 0 && clocks >= least) continue;
        least = clocks;
        const int64_t blocks = splits * (tiles < at_once ? tiles : at_once);
        best = {units, groups, splits, static_cast<int>(steps), static_cast<int>(steps_per_split),
                static_cast<int>(tiles), static_cast<int>(blocks)};
      }
    }
  }
  return best;
}

// Where a warp is: its next chunk is that of `tile`, `step`. Past the last tile: `tile` == tiles.
struct Position {
  int tile, step;
};

struct Share {  // of a warp: group and slot in it, steps from first to last
  int group, slots, units;
  int tile_step, first, last;

  PEFT_KERNELS_HOST_DEVICE Share(const Nf4Plan& plan, int block, int warp) {
    const int split = block % plan.splits;
    group = warp % plan.groups;
    slots = kPlanWarps / plan.groups;
    units = (plan.units - group + plan.groups - 1) / plan.groups;
    tile_step = plan.blocks / plan.splits;
    first = split * plan.steps_per_split + warp / plan.groups;
    const int end = (split + 1) * plan.steps_per_split;
    last = end < plan.steps ? end : plan.steps;
  }

  PEFT_KERNELS_HOST_DEVICE Position begin(const Nf4Plan& plan, int block) const {
    return {first < last ? block / plan.splits : plan.tiles, first};
  }

  PEFT_KERNELS_HOST_DEVICE void advance(Position& at) const {
    at.step += slots;
    if (at.step >= last) at = {at.tile + tile_step, first};
  }
};

// Whether the lower rows of a group's unit `u` are decoded by byte planes, the rest by the pair table: then shared
// memory, the integer units and the issue of instructions are about equally busy.
PEFT_KERNELS_HOST_DEVICE bool by_planes(int u) { return u % 2 == 1; }

// The first of the 16 rows, counted in the tile, of unit `u` of a group: units go round the groups.
PEFT_KERNELS_HOST_DEVICE int unit_row(const Nf4Plan& plan, int group, int u) {
  return (u * plan.groups + group) * kPlanRows;
}

// The buffer through which the warps of a block add up: 16 units times tokens of each at once, 16 rows for each token.
constexpr int kTokensAtOnce = 16;
constexpr int kTokenStride = 20;  // floats from token to token: no two lanes of a warp meet in a bank
constexpr int kBufferNumel = kPlanWarps * kTokensAtOnce * kTokenStride;

PEFT_KERNELS_HOST_DEVICE int buffer_offset(int warp, int u, int token, int row, int tokens) {
  return (warp * kTokensAtOnce + u * tokens + token) * kTokenStride + row;
}

// Sum number `i` of those that a round over the units from `unit` on makes: its token and row in the tile, and where
// the share of the first warp of its group stands in the buffer; that of the group's next warp is `groups` warps on.
struct Sum {
  int token, row, source;
};

PEFT_KERNELS_HOST_DEVICE int sums_in_round(const Nf4Plan& plan, int tokens, int m) {
  return kTokensAtOnce / tokens * plan.groups * kPlanRows * m;
}

PEFT_KERNELS_HOST_DEVICE Sum sum_of(const Nf4Plan& plan, int unit, int tokens, int i) {
  const int columns = kTokensAtOnce / tokens * plan.groups, row = i % kPlanRows, column = i / kPlanRows % columns;
  const int token = i / (columns * kPlanRows), u = column / plan.groups, group = column % plan.groups;
  return {token, unit_row(plan, group, unit + u) + row, buffer_offset(group, u, token, row, tokens)};
}

}  // namespace peft_kernels
