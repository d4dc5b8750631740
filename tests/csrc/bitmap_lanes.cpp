// The blocks of csrc/bitmap_linear.cu on the host, their threads one after another between barriers, by the functions
// that the device runs. Shared memory is NaN where nothing was copied, or where a warp did not wait for what was.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "bitmap_decode.cuh"

using namespace peft_kernels;

namespace {

constexpr int kLanes = 32;

enum Fault { kNone, kOutOfShared = 1, kOtherBank = 2, kBeyondValues = 3, kStoredTwice = 4, kDoesNotFit = 5 };

struct Call {
  BitmapWeight w;
  BitmapPlan plan;
  bool bulk;  // a thread copies a whole range, as from sm_90 on
  int64_t slots;  // of all values
  int dtype, m;
  const uint16_t* x;
};

double value(int dtype, uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  return dtype == kBFloat16 ? float_from_bfloat16(half) : float_from_float16(half);
}

// sums[lane][i] += A B as the PTX manual lays the operands of mma.m16n8k16 out over a warp.
void multiply(int dtype, const uint32_t (&operand)[kLanes][4], const uint32_t (&x)[kLanes][2],
              double (&sums)[kLanes][4]) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r)
        a[g + 8 * (r % 2)][2 * t + half + 8 * (r / 2)] = value(dtype, operand[lane][r] >> (16 * half));
      for (int r = 0; r < 2; ++r) b[2 * t + half + 8 * r][g] = value(dtype, x[lane][r] >> (16 * half));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) sums[lane][i] += a[g + 8 * (i / 2)][k] * b[k][2 * t + i % 2];
  }
}

struct Warp {
  LaneBits bits[kTurns][kLanes];
  double sums[kLanes][4] = {};
};

struct Block {
  const Call& call;
  int tile, split, fault = kNone;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared, arrives;  // in which range of its panel each byte does
  uint32_t counts[kBitmapWarps][kLanes];

  Block(const Call& call, int tile, int split)
      : call(call), tile(tile), split(split), warps(static_cast<std::size_t>(call.plan.threads / kLanes)),
        shared(static_cast<std::size_t>(call.plan.shared_bytes)), arrives(shared.size()) {}

  BitmapShare share(int warp) const {
    return BitmapShare(call.plan, tile, split, warp / call.plan.width, warp % call.plan.width);
  }

  // The slots of a strip's panel: the first and how many.
  void slots_of(const BitmapShare& share, int panel, int& first, int& slots) const {
    first = slots = 0;
    if (share.strip >= call.plan.strips) return;
    const int32_t* start = call.w.starts + static_cast<int64_t>(share.strip) * call.plan.panels + panel;
    first = start[0];
    slots = start[1] - first;
  }

  void load(int panel) {
    std::fill(shared.begin(), shared.end(), 0xFF);
    std::fill(arrives.begin(), arrives.end(), 0xFF);
    for (int warp = 0; warp < static_cast<int>(warps.size()); ++warp) {
      const BitmapShare s = share(warp);
      const int chunk = s.chunk(call.plan, panel);
      int first, slots;
      slots_of(s, panel, first, slots);
      for (int range = 0; call.bulk && s.warp == 0 && range < kBitmapRanges; ++range) {
        const BitmapRange bytes = range_of(slots, range);
        for (int at = bytes.begin; at < bytes.end; at += 16) copy(s, first, at, range);
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        counts[warp][lane] = 0;
        for (int turn = 0; turn < kTurns; ++turn) {
          LaneBits& bits = warps[warp].bits[turn][lane] = {};
          if (turn < s.turns(call.plan, panel))
            std::memcpy(&bits, static_cast<const uint8_t*>(call.w.bits) +
                                   (static_cast<int64_t>(s.strip) * call.plan.chunks + chunk + turn) *
                                       kBitmapChunkBytes + 16 * lane, 16);
          counts[warp][lane] += stream_counts(bits);
        }
        if (call.bulk) continue;
        std::vector<int> copied;
        copy_panel(slots, kLanes * call.plan.width, kLanes * s.warp + lane, [&](int at) { copied.push_back(at); },
                   [&](int range) {
                     for (int at : copied) copy(s, first, at, range);
                     copied.clear();
                   });
      }
    }
  }

  void copy(const BitmapShare& s, int first, int at, int range) {
    const int64_t from = static_cast<int64_t>(first) * kSlotBytes + at;
    const int to = s.group * call.plan.group_bytes + at;
    if (from + 16 > call.slots * kSlotBytes) { fault = kBeyondValues; return; }
    if (to + 16 > static_cast<int>(shared.size())) { fault = kOutOfShared; return; }
    std::memcpy(&shared[to], static_cast<const char*>(call.w.values) + from, 16);
    std::memset(&arrives[to], range, 16);
  }

  uint32_t read(uint32_t address, int lane, int ranges) {
    if (address / 4 % 32 != static_cast<uint32_t>(lane)) fault = kOtherBank;
    if (address + 2 > shared.size()) { fault = kOutOfShared; return 0; }
    if (arrives[address] >= ranges) return 0xFFFF;
    return shared[address] | static_cast<uint32_t>(shared[address + 1]) << 8;
  }

  // Two numbers of x at a column.
  uint32_t pair(int token, int column) const {
    uint32_t words = 0;
    for (int e = 0; e < 2; ++e)
      if (token < call.m && column + e < call.w.k)
        words |= static_cast<uint32_t>(call.x[token * call.w.k + column + e]) << (16 * e);
    return words;
  }

  // What a warp has in a panel.
  void multiply_panel(int warp, int panel) {
    const BitmapShare s = share(warp);
    int first, slots, waited = 0;
    slots_of(s, panel, first, slots);
    std::vector<Streams> streams;
    std::vector<uint32_t> ends;
    for (int lane = 0; lane < kLanes; ++lane) {
      ends.push_back(counts_before(counts, s.warp_of_block - s.warp, s.warp_of_block, lane));
      streams.emplace_back(static_cast<uint32_t>(s.group * call.plan.group_bytes), lane, ends.back());
    }
    for (int turn = 0; turn < s.turns(call.plan, panel); ++turn) {
      uint32_t last = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        ends[lane] += stream_counts(warps[warp].bits[turn][lane]);
        last = greatest(last, last_slot(ends[lane]));
      }
      while (waited < kBitmapRanges && needs_range(static_cast<int>(last), slots, waited)) ++waited;
      multiply_chunk(warp, s.chunk(call.plan, panel) + turn, warps[warp].bits[turn], waited, streams);
    }
  }

  void multiply_chunk(int warp, int chunk, const LaneBits (&bits)[kLanes], int ranges, std::vector<Streams>& streams) {
    for (int tile = 0; tile < 16; ++tile) {
      uint32_t operand[kLanes][4], right[kLanes][2];
      for (int lane = 0; lane < kLanes; ++lane) {
        decode_tile(bits[lane].words[tile / 4] >> (8 * (tile % 4)), streams[lane],
                    [&](uint32_t address) { return read(address, lane, ranges); }, operand[lane]);
        const int column = chunk * kBitmapColumns + bitmap_x_column(lane, tile / 2) + 4 * (tile % 2);
        for (int r = 0; r < 2; ++r) right[lane][r] = pair(lane_token(lane), column + 2 * r);
      }
      multiply(call.dtype, operand, right, warps[warp].sums);
    }
  }

  std::vector<double> run() {
    const int count = static_cast<int>(warps.size());
    for (int panel = share(0).first_panel; panel < call.plan.panels; panel += call.plan.splits) {
      load(panel);
      for (int warp = 0; warp < count; ++warp) multiply_panel(warp, panel);
    }
    std::vector<double> sums(static_cast<std::size_t>(call.plan.shared_bytes / 4), std::nan(""));
    for (int warp = 0; warp < count; ++warp)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i)
          sums.at(bitmap_sum_offset(warp, result_token(lane, i), result_row(lane, i))) = warps[warp].sums[lane][i];
    return sums;
  }
};

// y [m, n], which is NaN: the blocks that share a strip out, and what the threads of each of them add and store.
int linear(const Call& call, double* y) {
  const BitmapPlan& plan = call.plan;
  for (int tile = 0; tile < plan.tiles; ++tile) {
    std::vector<std::vector<double>> sums;
    for (int split = 0; split < plan.splits; ++split) {
      Block block(call, tile, split);
      sums.push_back(block.run());
      if (block.fault != kNone) return block.fault;
    }
    for (int i = 0; i < kBitmapRows * plan.groups * call.m; ++i) {
      const BitmapSum which(plan, i);
      const int strip = tile * plan.groups + which.group;
      if (strip >= plan.strips) continue;
      const int row = call.w.order[strip * kBitmapRows + which.row];
      if (row >= call.w.n) continue;
      double& target = y[which.token * call.w.n + row];
      if (!std::isnan(target)) return kStoredTwice;
      target = 0;
      for (const auto& share : sums) target += which.over_warps(plan, share.data());
    }
  }
  return kNone;
}

BitmapWeight shape(const int64_t* numbers) {
  return {numbers[0], numbers[1], static_cast<int>(numbers[2]), static_cast<int>(numbers[3]),
          nullptr, nullptr, nullptr, nullptr};
}

}  // namespace

// `numbers` are the weight's, `gpu` multiprocessors, bytes of shared memory and whether there are clusters.
extern "C" {

int bitmap_linear(int dtype, const int64_t* numbers, const void* const* tensors, int64_t slots, const int* gpu, int m,
                  const uint16_t* x, double* y) {
  Call call{shape(numbers), {}, gpu[2] != 0, slots, dtype, m, x};
  call.w.values = tensors[0];
  call.w.bits = tensors[1];
  call.w.starts = static_cast<const int32_t*>(tensors[2]);
  call.w.order = static_cast<const int32_t*>(tensors[3]);
  if (!bitmap_fits(call.w)) return kDoesNotFit;
  call.plan = bitmap_plan(call.w, {gpu[0], gpu[1], gpu[2] != 0});
  return linear(call, y);
}

int bitmap_plan_of(const int64_t* numbers, const int* gpu, int* plan) {
  const BitmapWeight w = shape(numbers);
  if (!bitmap_fits(w)) return kDoesNotFit;
  const BitmapPlan p = bitmap_plan(w, {gpu[0], gpu[1], gpu[2] != 0});
  const int values[] = {p.strips, p.chunks, p.turns, p.width, p.groups, p.splits, p.tiles, p.threads, p.shared_bytes};
  std::memcpy(plan, values, sizeof values);
  return kNone;
}

}
