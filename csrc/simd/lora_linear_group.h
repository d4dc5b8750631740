// The low-rank half of lora_linear_group on one block of rows; included by each.h once per vector width.

#include "tile.h"
#include "adapter_gradients.h"

inline void clear_ranks(float* s, int64_t stride) { std::memset(s, 0, kTileRows * stride * sizeof(float)); }

inline void load_ranks(const GroupJob& job, int64_t row, int rows, float* s) {
  with_type(job.s.dtype, [&](auto type) {
    for (int m = 0; m < rows; ++m)
      for (const Slot& slot : job.slots)
        load_row<decltype(type), kFloats>(at(job.s, row + m, slot.column), slot.r, nullptr, 1.0f,
                                          s + m * job.ranks + slot.first);
  });
}

inline void store_ranks(const GroupJob& job, const float* s, int64_t row, int rows) {
  with_type(job.s.dtype, [&](auto type) {
    for (int m = 0; m < rows; ++m)
      for (const Slot& slot : job.slots)
        store_row<decltype(type)>(s + m * job.ranks + slot.first, slot.r, 1.0f,
                                  const_cast<char*>(at(job.s, row + m, slot.column)));
  });
}

inline void mask_tokens(const GroupJob& job, int64_t row, int rows, float* s) {
  if (!job.token_mask) return;
  for (int m = 0; m < rows; ++m)
    if (!job.token_mask[row + m]) std::memset(s + m * job.ranks, 0, job.ranks * sizeof(float));
}

inline void scale_ranks(const GroupJob& job, int rows, float* s) {
  for (int m = 0; m < rows; ++m)
    for (const Slot& slot : job.slots)
      for (int64_t j = 0; j < padded_ranks(slot.r); ++j)
        s[m * job.ranks + slot.first + j] *= static_cast<float>(slot.scaling);
}

// The masks of the tile of x at (row, column), or null without dropout. Tiles are visited from left to right.
inline const int16_t* masks_at(const GroupJob& job, const Run& run, int64_t row, int rows, int64_t column,
                               int16_t* masks) {
  if (!run.dropout.seed) return nullptr;
  if (column % kMaskColumns == 0) tile_masks(run.dropout, job.k, row, rows, column, masks);
  return masks + column % kMaskColumns;
}

// Whether rows can be read where they lie: a few at a time from end to end, which the processor's prefetch follows.
inline bool in_place(const Matrix& matrix, int rows) { return matrix.dtype == kFloat32 && rows % kTallRows == 0; }

inline void shrink_in_place(const Matrix& matrix, int64_t row, int rows, const Run& run, float* s, int64_t s_stride) {
  for (int m = 0; m < rows; m += kTallRows)
    for (int64_t column = 0; column < run.length; column += kTileColumns)
      shrink(reinterpret_cast<const float*>(at(matrix, row + m, column)), matrix.row_stride, kTallRows,
             tile_columns(column, run.length), run.packed, column, run.length, run.width, s + m * s_stride, s_stride);
}

inline void forward_down(const GroupJob& job, const Run& run, int64_t row, int rows, const Scratch& scratch) {
  for (int64_t column = 0; column < job.k; column += kTileColumns) {
    const int columns = tile_columns(column, job.k);
    const int16_t* masks = masks_at(job, run, row, rows, column, scratch.masks);
    load_tile(job.x, row, rows, column, columns, masks, static_cast<float>(run.dropout.scale), scratch.tile);
    shrink(scratch.tile, kTileColumns, rows, columns, run.packed, column, job.k, run.width, scratch.s + run.first,
           job.ranks);
  }
}

inline void forward_block(const GroupJob& job, int64_t row, int rows, const Scratch& scratch) {
  float* s = scratch.s;
  clear_ranks(s, job.ranks);
  for (const Run& run : job.downs) {
    if (!run.dropout.seed && in_place(job.x, rows)) shrink_in_place(job.x, row, rows, run, s + run.first, job.ranks);
    else forward_down(job, run, row, rows, scratch);
  }
  mask_tokens(job, row, rows, s);
  store_ranks(job, s, row, rows);
  scale_ranks(job, rows, s);
  for (const Run& run : job.ups)
    expand(s + run.first, job.ranks, run.terms, run.packed, run.width, nullptr, 1.0f, run.y, row, rows, 0,
           static_cast<int>(run.length));
}

// dS of the block's rows, scaled, and their share of dB.
inline void backward_up(const GroupJob& job, int64_t row, int rows, bool first, float* sums, const Scratch& scratch) {
  float* grad_s = scratch.grad_s;
  if (job.need_b) load_ranks(job, row, rows, scratch.s);
  if (job.need_s) clear_ranks(grad_s, job.ranks);
  for (const Run& run : job.ups) {
    const bool shrunk = job.need_s && in_place(run.y, rows);
    if (shrunk) shrink_in_place(run.y, row, rows, run, grad_s + run.first, job.ranks);
    if (!run.sum && (shrunk || !job.need_s)) continue;
    for (int64_t column = 0; column < run.length; column += kTileColumns) {
      const int columns = tile_columns(column, run.length);
      load_tile(run.y, row, rows, column, columns, nullptr, 1.0f, scratch.tile);
      if (job.need_s && !shrunk)
        shrink(scratch.tile, kTileColumns, rows, columns, run.packed, column, run.length, run.width,
               grad_s + run.first, job.ranks);
      if (run.sum)
        outer(scratch.s + run.first, job.ranks, run.width, scratch.tile, rows, columns, job.m, first,
              sums + run.sums + column * run.width);
    }
  }
  if (!job.need_s) return;
  mask_tokens(job, row, rows, grad_s);
  scale_ranks(job, rows, grad_s);
}

// The block's rows of dx, and their share of dA.
inline void backward_down(const GroupJob& job, int64_t row, int rows, bool first, float* sums, const Scratch& scratch) {
  for (const Run& run : job.downs) {
    const float* grad_s = scratch.grad_s + run.first;
    const float keep_scale = static_cast<float>(run.dropout.scale);
    for (int64_t span = 0; span < job.k; span += kMaskColumns) {
      const int64_t end = std::min(job.k, span + kMaskColumns);
      if (run.dropout.seed) tile_masks(run.dropout, job.k, row, rows, span, scratch.masks);
      const int16_t* masks = run.dropout.seed ? scratch.masks : nullptr;
      for (int64_t column = span; run.sum && column < end; column += kTileColumns) {
        const int columns = tile_columns(column, end);
        load_tile(job.x, row, rows, column, columns, masks ? masks + column - span : nullptr, keep_scale, scratch.tile);
        outer(grad_s, job.ranks, run.width, scratch.tile, rows, columns, job.m, first,
              sums + run.sums + column * run.width);
      }
      if (job.grad_x.data)
        expand(grad_s, job.ranks, run.terms, run.packed + span * run.width, run.width, masks, keep_scale, job.grad_x,
               row, rows, span, static_cast<int>(end - span));
    }
  }
}

inline void backward_block(const GroupJob& job, int64_t row, int rows, bool first, float* sums,
                           const Scratch& scratch) {
  backward_up(job, row, rows, first, sums, scratch);
  if (job.need_s) backward_down(job, row, rows, first, sums, scratch);
}
