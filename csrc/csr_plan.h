// How a GPU divides the product with a weight of kept numbers and their columns: a function of the weight and the GPU,
// not of how many rows x has, so that a row has the same bits alone and in a batch. Host and device.
#pragma once

#include <cstdint>

#include "csr.h"
#include "device_numeric.h"

namespace peft_kernels {

constexpr int kCsrWarps = 32;          // of a block, at most
constexpr int kCsrLeastWarps = 4;      // and at least: they copy x
constexpr int kCsrRows = 8;            // rows of x at a time, at most
constexpr int kCsrLeastLanes = 8;      // of a warp that share a row of W
constexpr int kCsrMostParts = 8;       // warps that share one
constexpr int kCsrGroupsAhead = 4096;  // groups that a block asks for before it knows which are its own

struct CsrGpu {
  int multiprocessors, shared_bytes;
};

// A block takes `rows` rows of W in a turn, a row `lanes` lanes of a warp or (lanes 32) `parts` warps. Tiles of so many
// rows go to `blocks` blocks in turn.
struct CsrPlan {
  int lanes, parts, warps, rows, tiles, blocks;
};

// Bytes of a column of `rows` rows of x in shared memory. One row is a float.
PEFT_KERNELS_HOST_DEVICE constexpr int csr_column_bytes(int rows) { return rows == 1 ? 4 : 2 * rows; }

// Columns there, in pairs: those of x and the zero that what pads meets.
PEFT_KERNELS_HOST_DEVICE int csr_slots(int64_t k) { return static_cast<int>(k + 2) / 2 * 2; }

// Where the sums of the warps that share rows begin.
PEFT_KERNELS_HOST_DEVICE int csr_sums_offset(int64_t k, int rows) {
  return (csr_slots(k) * csr_column_bytes(rows) + 15) / 16 * 16;
}

inline int csr_shared_bytes(const CsrPlan& plan, int64_t k, int rows) {
  return csr_sums_offset(k, rows) + (plan.parts > 1 ? plan.warps * rows * 4 : 0);
}

// `groups` of the whole weight. Rows that are short share a warp where there are enough of them; rows that are long and
// few are shared by warps.
inline CsrPlan csr_plan(int64_t n, int64_t groups, const CsrGpu& gpu) {
  const int64_t typical = (groups + n - 1) / n, most_warps = int64_t{gpu.multiprocessors} * kCsrWarps;
  CsrPlan plan{32, 1, 0, 0, 0, 0};
  while (plan.lanes > kCsrLeastLanes && 2 * typical <= plan.lanes && n * (plan.lanes / 2) >= 32 * most_warps)
    plan.lanes /= 2;
  while (plan.parts < kCsrMostParts && 2 * n * plan.parts <= most_warps && typical > 32 * plan.parts)
    plan.parts *= 2;
  // As many warps as give each multiprocessor a block, in a turn or in many.
  const int in_warp = 32 / plan.lanes;
  const int64_t warps = (n + in_warp - 1) / in_warp * plan.parts;
  const int64_t wanted = (warps + gpu.multiprocessors - 1) / gpu.multiprocessors;
  const int64_t whole = (wanted + plan.parts - 1) / plan.parts * plan.parts;
  const int fewest = greatest(kCsrLeastWarps, plan.parts);
  plan.warps = static_cast<int>(least<int64_t>(kCsrWarps, greatest<int64_t>(fewest, whole)));
  plan.rows = plan.warps / plan.parts * in_warp;
  plan.tiles = static_cast<int>((n + plan.rows - 1) / plan.rows);
  plan.blocks = least(plan.tiles, gpu.multiprocessors);
  return plan;
}

// How many rows of x are taken at a time: all, or as many as fit; 0 where not even one does.
inline int csr_rows_at_once(const CsrPlan& plan, int64_t k, int m, int shared_bytes) {
  int rows = 1;
  while (rows < m && rows < kCsrRows) rows *= 2;
  while (rows > 0 && csr_shared_bytes(plan, k, rows) > shared_bytes) rows /= 2;
  return rows;
}

// What a thread does in its block.
struct CsrShare {
  int row;   // of the block's rows in a turn
  int lane;  // of the threads that share it
  int stride;

  PEFT_KERNELS_HOST_DEVICE CsrShare(const CsrPlan& plan, int thread) {
    const int threads = plan.parts * plan.lanes;
    row = thread / threads;
    lane = thread % threads;
    stride = threads;
  }
};

// The groups that a block asks for at once, [begin, end), by where its first rows are if all are equally long. What
// other blocks need is none the worse there: the cache is one for all.
struct CsrAhead {
  int64_t begin, end;

  PEFT_KERNELS_HOST_DEVICE CsrAhead(const CsrPlan& plan, int64_t n, int64_t groups, int block) {
    begin = least(groups, block * int64_t{plan.rows} * groups / n);
    end = least(groups, (block + 1) * int64_t{plan.rows} * groups / n);
    end = least(end, begin + kCsrGroupsAhead);
  }
};

}  // namespace peft_kernels
