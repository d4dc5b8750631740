// The low-rank half of lora_linear and lora_linear_group on the CPU, added to the base matmuls, which stay in PyTorch
// (MKL, oneDNN). The other way round, matmuls that add to the low-rank half, is as fast and rounds more: MKL starts its sums
// from what is there.
//
// A block of rows goes through all products while its tiles are in the L1 cache. Sums over rows (dA, dB) are kept for each
// part of the rows and added in order at the end; the number of parts depends on the sizes alone, so that the bits do not
// depend on the number of threads.
#include <omp.h>

#include <algorithm>

#include "buffer.h"
#include "cpu_kernels.h"
#include "tile_sizes.h"

namespace peft_kernels {

// The place of an adapter: its column in s, and the first of its padded ranks in a block's scratch.
struct Slot {
  int64_t column, first, r;
  double scaling;
};

// Adapters beside one another that go through a product together: under one mask on the side of x ("down"), into one
// output on the side of y ("up").
struct Run {
  size_t begin, end;            // adapters
  int64_t first, width, terms;  // padded ranks; `terms` leaves out the padding of the last adapter
  int64_t length;               // columns: K, or the output's N
  Dropout dropout;              // down
  Matrix y;                     // up
  bool sum = false;             // whether a gradient of this side's weights is wanted
  int64_t sums = 0;             // where its sums lie in a part's
  float* packed = nullptr;
};

struct GroupJob {
  int64_t m, k, ranks;  // padded ranks of all adapters
  Matrix x, s, grad_x;
  const uint8_t* token_mask;
  std::vector<Slot> slots;
  std::vector<Run> downs, ups;
  bool need_s = false, need_b = false;
};

// Buffers of one thread: a tile, its masks, and the block's rows of s and of dS.
struct Scratch {
  float *tile, *s, *grad_s;
  int16_t* masks;
};

}  // namespace peft_kernels

#define PEFT_KERNELS_BODY "lora_linear_group.h"
#include "simd/each.h"

namespace peft_kernels {
namespace {

int64_t steps(int64_t total, int64_t step) { return (total + step - 1) / step; }
int64_t whole_tiles(int64_t columns) { return steps(columns, kTileColumns) * kTileColumns; }
bool same_mask(const Dropout& a, const Dropout& b) { return a.seed == nullptr && b.seed == nullptr; }

GroupJob make_job(const Group& group, Matrix grad_x) {
  GroupJob job{group.m, group.k, 0, group.x, group.s, grad_x, group.token_mask, {}, {}, {}};
  for (size_t i = 0; i < group.adapters.size(); ++i) {
    const Adapter& adapter = group.adapters[i];
    const Output& output = group.outputs[static_cast<size_t>(adapter.output)];
    const int64_t first = job.ranks;
    if (i == 0 || !same_mask(group.adapters[i - 1].dropout, adapter.dropout))
      job.downs.push_back({i, i, first, 0, 0, group.k, adapter.dropout, {}});
    if (i == 0 || group.adapters[i - 1].output != adapter.output)
      job.ups.push_back({i, i, first, 0, 0, output.n, {}, output.y});
    job.slots.push_back({adapter.column, first, adapter.r, adapter.scaling});
    job.ranks += PEFT_KERNELS_DISPATCH(padded_ranks, adapter.r);
    for (Run* run : {&job.downs.back(), &job.ups.back()}) {
      run->end = i + 1;
      run->terms = first + adapter.r - run->first;
      run->width = job.ranks - run->first;
    }
    job.downs.back().sum |= adapter.grad_A.data != nullptr;
    job.ups.back().sum |= adapter.grad_B.data != nullptr;
    job.need_s |= adapter.grad_A.data != nullptr || grad_x.data != nullptr;
    job.need_b |= adapter.grad_B.data != nullptr;
  }
  return job;
}

// Starting a thread pays for itself from about 2 us of work on.
int useful_threads(const GroupJob& job, int threads) {
  double columns = static_cast<double>(job.k);
  for (const Run& run : job.ups) columns += static_cast<double>(run.length);
  const double work = static_cast<double>(job.m) * columns * static_cast<double>(job.ranks);
  return std::clamp(static_cast<int>(std::min(work / 131072.0, 1e6)), 1, std::max(threads, 1));
}

// Rows cut into parts of almost the same size, a whole number of register tiles each but for the last.
struct Parts {
  int64_t m, rows, count;

  Parts(int64_t m, int64_t wanted) : m(m), rows(steps(steps(m, wanted), 12) * 12), count(steps(m, rows)) {}

  // Calls f(row, rows, whether it is the part's first) for each block of a part.
  template <class Function>
  void for_blocks(int64_t part, Function f) const {
    const int64_t begin = part * rows, end = std::min(m, begin + rows);
    const int64_t step = steps(steps(end - begin, steps(end - begin, kTileRows)), 12) * 12;
    for (int64_t row = begin; row < end; row += step)
      f(row, static_cast<int>(std::min(step, end - row)), row == begin);
  }
};

// At least four threads share small problems; on large ones each part's sums are a small share of the work.
int64_t parts_with_sums(int64_t m) {
  return std::max(std::min<int64_t>(steps(m, kTileRows), 4), std::min<int64_t>(m / 128, 64));
}

// What threads share beside the job: packed weights, scratch for each thread, sums for each part.
struct Workspace {
  int64_t scratch_size, sums_size = 0;
  Buffer<float> weights, scratch, sums;
  Buffer<int16_t> masks;

  Workspace(GroupJob& job, int threads, int64_t parts) : scratch_size(kTileRows * (kTileColumns + 2 * job.ranks)) {
    int64_t size = 0;
    for (auto* runs : {&job.downs, &job.ups})
      for (Run& run : *runs) {
        size += run.width * whole_tiles(run.length);
        run.sums = sums_size;
        sums_size += run.sum ? run.width * whole_tiles(run.length) : 0;
      }
    weights = allocate<float>(size);
    scratch = allocate<float>(threads * scratch_size);
    masks = allocate<int16_t>(threads * kTileRows * kMaskColumns);
    sums = allocate<float>(parts * sums_size);
    float* next = weights.get();
    for (auto* runs : {&job.downs, &job.ups})
      for (Run& run : *runs) {
        run.packed = next;
        next += run.width * whole_tiles(run.length);
      }
  }

  Scratch of_thread(int64_t ranks) const {
    const int thread = omp_get_thread_num();
    float* first = scratch.get() + thread * scratch_size;
    float* s = first + kTileRows * kTileColumns;
    return {first, s, s + kTileRows * ranks, masks.get() + thread * kTileRows * kMaskColumns};
  }
};

// f(run, first column, end) for the tiles of each run's weight. Called by every thread of a parallel region; ends in a
// barrier.
template <class Function>
void for_tiles(const std::vector<Run>& runs, Function f) {
  for (const Run& run : runs) {
#pragma omp for schedule(static) nowait
    for (int64_t tile = 0; tile < steps(run.length, kTileColumns); ++tile)
      f(run, tile * kTileColumns, std::min(run.length, (tile + 1) * kTileColumns));
  }
#pragma omp barrier
}

// The weights of a run's adapters, packed as forward's and backward's products want them.
void pack(const Group& group, const GroupJob& job, const Run& run, bool down, bool backward, int64_t begin,
          int64_t end) {
  for (size_t i = run.begin; i < run.end; ++i) {
    const Adapter& adapter = group.adapters[i];
    const int64_t r = adapter.r, first = job.slots[i].first - run.first;
    if (down && !backward)
      PEFT_KERNELS_DISPATCH(pack_shrink_by_rank, adapter.lora_A, r, begin, end, first, run.packed, run.length, run.width);
    else if (down)
      PEFT_KERNELS_DISPATCH(pack_expand_by_rank, adapter.lora_A, r, begin, end, first, run.packed, run.width);
    else if (!backward)
      PEFT_KERNELS_DISPATCH(pack_expand_by_row, adapter.lora_B, r, begin, end, first, run.packed, run.width);
    else
      PEFT_KERNELS_DISPATCH(pack_shrink_by_row, adapter.lora_B, r, begin, end, first, run.packed, run.length, run.width);
  }
}

// Stores the gradients of the adapters of a run from the sums of all parts, for a tile of columns.
void store_gradients(const Group& group, const GroupJob& job, const Workspace& workspace, int64_t parts, const Run& run,
                     bool down, int64_t begin, int64_t end) {
  float* total = workspace.of_thread(job.ranks).tile;
  for (size_t i = run.begin; i < run.end; ++i) {
    const Adapter& adapter = group.adapters[i];
    const Matrix& grad = down ? adapter.grad_A : adapter.grad_B;
    if (grad.data == nullptr) continue;
    for (int64_t rank = 0; rank < adapter.r; rank += kTileRows) {
      const int64_t ranks = std::min<int64_t>(kTileRows, adapter.r - rank);
      const int64_t at = run.sums + begin * run.width + (job.slots[i].first - run.first + rank) * kTileColumns;
      PEFT_KERNELS_DISPATCH(total_of_parts, workspace.sums.get() + at, workspace.sums_size, parts, ranks, total);
      if (down)
        PEFT_KERNELS_DISPATCH(store_by_rank, total, ranks, grad, rank, begin, static_cast<int>(end - begin));
      else
        PEFT_KERNELS_DISPATCH(store_by_row, total, ranks, grad, rank, begin, static_cast<int>(end - begin),
                              static_cast<float>(adapter.scaling));
    }
  }
}

}  // namespace

void lora_group_forward(const Group& group, int threads) {
  GroupJob job = make_job(group, {});
  threads = useful_threads(job, threads);
  const Parts parts(group.m, threads);
  const Workspace workspace(job, threads, 0);
#pragma omp parallel num_threads(threads)
  {
    for_tiles(job.downs, [&](const Run& run, int64_t begin, int64_t end) {
      pack(group, job, run, true, false, begin, end);
    });
    for_tiles(job.ups, [&](const Run& run, int64_t begin, int64_t end) {
      pack(group, job, run, false, false, begin, end);
    });
    const Scratch scratch = workspace.of_thread(job.ranks);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts.count; ++part)
      parts.for_blocks(part, [&](int64_t row, int rows, bool) {
        PEFT_KERNELS_DISPATCH(forward_block, job, row, rows, scratch);
      });
  }
}

void lora_group_backward(const Group& group, Matrix grad_x, int threads) {
  GroupJob job = make_job(group, grad_x);
  threads = useful_threads(job, threads);
  const Parts parts(group.m, parts_with_sums(group.m));
  const Workspace workspace(job, threads, parts.count);
#pragma omp parallel num_threads(threads)
  {
    if (grad_x.data)
      for_tiles(job.downs, [&](const Run& run, int64_t begin, int64_t end) {
        pack(group, job, run, true, true, begin, end);
      });
    if (job.need_s)
      for_tiles(job.ups, [&](const Run& run, int64_t begin, int64_t end) {
        pack(group, job, run, false, true, begin, end);
      });
    const Scratch scratch = workspace.of_thread(job.ranks);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts.count; ++part) {
      float* sums = workspace.sums.get() + part * workspace.sums_size;
      parts.for_blocks(part, [&](int64_t row, int rows, bool first) {
        PEFT_KERNELS_DISPATCH(backward_block, job, row, rows, first, sums, scratch);
      });
    }
    for_tiles(job.downs, [&](const Run& run, int64_t begin, int64_t end) {
      store_gradients(group, job, workspace, parts.count, run, true, begin, end);
    });
    for_tiles(job.ups, [&](const Run& run, int64_t begin, int64_t end) {
      store_gradients(group, job, workspace, parts.count, run, false, begin, end);
    });
  }
}

}  // namespace peft_kernels
