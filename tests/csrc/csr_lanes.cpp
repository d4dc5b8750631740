// The blocks of csrc/csr_linear.cu on the host, by the functions that the device compiles: plan, staging, a thread's
// groups, the sums over lanes and warps. Sums are in double, so that whatever their order they are exact.
#include <cmath>
#include <cstring>
#include <vector>

#include "csr_plan.h"
#include "csr_row.cuh"

using namespace peft_kernels;

namespace {

enum Fault { kNone, kOutOfGroups, kOutOfColumns, kNotStaged, kStoredTwice, kDoesNotFit };

struct Call {
  CsrWeight w;
  CsrPlan plan;
  int64_t groups;
  int m, rows;
  const uint16_t* x;  // [m, width], width a multiple of 8
};

template <int rows>
using Sums = double[rows];

template <int dtype, int rows>
struct Block {
  const Call& call;
  std::vector<CsrColumn<rows>> columns;
  std::vector<char> staged;
  int fault = kNone;

  explicit Block(const Call& call) : call(call) {}

  void stage(int first) {
    const int slots = csr_slots(call.w.k), width = static_cast<int>((call.w.k + 7) / 8 * 8);
    columns.assign(slots, {});
    staged.assign(slots, 0);
    for (int column = 0; column < slots; column += 2) {
      uint32_t pairs[rows] = {};
      for (int row = 0; row < rows; ++row)
        if (first + row < call.m && column < width)
          std::memcpy(&pairs[row], call.x + int64_t{first + row} * width + column, 4);
      csr_columns<dtype, rows>(pairs, columns.at(column), columns.at(column + 1));
      staged[column] = staged[column + 1] = 1;
    }
  }

  CsrGroup fetch(int64_t group) {
    CsrGroup found{};
    if (group < 0 || group >= call.groups) fault = kOutOfGroups;
    else {
      std::memcpy(found.values, static_cast<const char*>(call.w.values) + 16 * group, 16);
      std::memcpy(found.columns, static_cast<const char*>(call.w.columns) + 16 * group, 16);
    }
    return found;
  }

  CsrColumn<rows> load(uint32_t column) {
    if (column > call.w.k || column >= staged.size()) { fault = kOutOfColumns; return {}; }
    if (!staged[column]) fault = kNotStaged;
    return columns[column];
  }

  void store(double* y, int of_x, int64_t row, double value) {
    if (row >= call.w.n || of_x >= call.m) return;
    double& target = y[of_x * call.w.n + row];
    if (!std::isnan(target)) fault = kStoredTwice;
    target = value;
  }

  // A turn of the block: its rows from `first` on, for rows of x from `first_x` on.
  void turn(int64_t first, int first_x, double* y) {
    const int threads = 32 * call.plan.warps, lanes = call.plan.lanes, parts = call.plan.parts;
    std::vector<double> sums(threads * rows);
    for (int thread = 0; thread < threads; ++thread) {
      const CsrShare share(call.plan, thread);
      const int64_t row = first + share.row;
      CsrRun run{};
      const auto fetch_one = [&](int64_t group) { return fetch(group); };
      const bool lives = row < call.w.n;
      const int64_t begin = lives ? call.w.starts[row] : 0, end = lives ? call.w.starts[row + 1] : 0;
      run.begin(begin, end, share.lane, share.stride, fetch_one);
      run.template multiply<dtype, rows>(fetch_one, [&](uint32_t column) { return load(column); },
                                         reinterpret_cast<Sums<rows>&>(sums[thread * rows]));
    }
    int offset = lanes / 2;
    fold<rows>(sums, offset);
    for (; offset > 0; offset /= 2) {
      const auto before = sums;
      for (int thread = 0; thread < threads; ++thread) sums[thread * rows] += before[(thread ^ offset) * rows];
    }
    std::vector<double> warps(call.plan.warps * rows, std::nan(""));
    for (int thread = 0; thread < threads; ++thread) {
      const CsrShare share(call.plan, thread);
      const int lane = share.lane & (lanes - 1), of_x = csr_row_left(lane, lanes, rows);
      if (!csr_stores(lane, lanes, rows)) continue;
      if (parts == 1) store(y, first_x + of_x, first + share.row, sums[thread * rows]);
      else warps[thread / 32 * rows + of_x] = sums[thread * rows];
    }
    for (int i = 0; parts > 1 && i < call.plan.rows * rows; ++i) {
      double sum = 0;
      for (int part = 0; part < parts; ++part) sum += warps.at((i / rows * parts + part) * rows + i % rows);
      store(y, first_x + i % rows, first + i / rows, sum);
    }
  }

  template <int count>
  void fold(std::vector<double>& sums, int& offset) {
    if constexpr (count > 1) {
      const auto before = sums;
      for (int thread = 0; thread < 32 * call.plan.warps; ++thread) {
        const bool upper = (thread & offset) != 0;
        for (int i = 0; i < count / 2; ++i)
          sums[thread * rows + i] = csr_kept<count>(&before[thread * rows], i, upper) +
                                    csr_sent<count>(&before[(thread ^ offset) * rows], i, !upper);
      }
      offset /= 2;
      fold<count / 2>(sums, offset);
    }
  }
};

template <int dtype, int rows>
int linear(const Call& call, double* y) {
  for (int block = 0; block < call.plan.blocks; ++block) {
    Block<dtype, rows> one(call);
    for (int first_x = 0; first_x < call.m; first_x += rows) {
      one.stage(first_x);
      for (int tile = block; tile < call.plan.tiles; tile += call.plan.blocks)
        one.turn(int64_t{tile} * call.plan.rows, first_x, y);
    }
    if (one.fault != kNone) return one.fault;
  }
  return kNone;
}

template <int dtype>
int linear_of(const Call& call, double* y) {
  switch (call.rows) {
    case 1: return linear<dtype, 1>(call, y);
    case 2: return linear<dtype, 2>(call, y);
    case 4: return linear<dtype, 4>(call, y);
    case 8: return linear<dtype, 8>(call, y);
    default: return kDoesNotFit;
  }
}

}  // namespace

extern "C" {

// y [m, n], which is NaN. gpu: multiprocessors, bytes of shared memory; used: the plan and the rows of x at a time.
int csr_linear(int dtype, int64_t n, int64_t k, int64_t groups, const void* values, const void* columns,
               const int32_t* starts, const int* gpu, int m, const uint16_t* x, double* y, int* used) {
  Call call{{n, k, dtype, values, columns, starts}, csr_plan(n, groups, {gpu[0], gpu[1]}), groups, m, 0, x};
  call.rows = csr_rows_at_once(call.plan, k, m, gpu[1]);
  const int numbers[] = {call.plan.lanes, call.plan.parts, call.plan.warps, call.plan.rows, call.plan.tiles,
                         call.plan.blocks, call.rows};
  std::memcpy(used, numbers, sizeof numbers);
  return dtype == kBFloat16 ? linear_of<kBFloat16>(call, y) : linear_of<kFloat16>(call, y);
}

void csr_plan_of(int64_t n, int64_t groups, const int* gpu, int* plan) {
  const CsrPlan p = csr_plan(n, groups, {gpu[0], gpu[1]});
  const int numbers[] = {p.lanes, p.parts, p.warps, p.rows, p.tiles, p.blocks, 0};
  std::memcpy(plan, numbers, sizeof numbers);
}

// What all blocks ask for: begins and ends, [blocks, 2].
void csr_ahead(int64_t n, int64_t groups, const int* gpu, int64_t* spans) {
  const CsrPlan plan = csr_plan(n, groups, {gpu[0], gpu[1]});
  for (int block = 0; block < plan.blocks; ++block) {
    const CsrAhead ahead(plan, n, groups, block);
    spans[2 * block] = ahead.begin;
    spans[2 * block + 1] = ahead.end;
  }
}

}
