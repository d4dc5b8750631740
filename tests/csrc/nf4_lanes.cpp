// The lanes of csrc/nf4_linear.cu on the host, one after another, by the functions that the device runs: what they
// load, decode and accumulate. mma.m16n8k16 is written out as the PTX manual lays its operands out over a warp.
#include <cmath>
#include <cstring>
#include <vector>

#include "nf4_chunk.cuh"

using namespace peft_kernels;

namespace {

constexpr int kLanes = 32;

std::vector<CodePair> pair_table() {
  std::vector<CodePair> table(256 * kLanes);
  for (int byte = 0; byte < 256; ++byte)
    for (int lane = 0; lane < kLanes; ++lane) table[byte * kLanes + lane] = code_pair(byte);
  return table;
}

const char* table() {
  static const std::vector<CodePair> entries = pair_table();
  return reinterpret_cast<const char*>(entries.data());
}

double value(int dtype, uint16_t bits) {
  return dtype == kBFloat16 ? float_from_bfloat16(bits) : float_from_float16(bits);
}

struct Warp {
  uint32_t upper[kLanes][4], lower[kLanes][4];
};

// sum[lane][i] += A B with A from `operand`, B from two words of x a lane.
void multiply(int dtype, const uint32_t (&operand)[kLanes][4], const uint32_t (&x)[kLanes][2],
              double (&sums)[kLanes][4]) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const auto bits = [&](uint32_t word) { return static_cast<uint16_t>(word >> (16 * half)); };
      a[g][2 * t + half] = value(dtype, bits(operand[lane][0]));
      a[g + 8][2 * t + half] = value(dtype, bits(operand[lane][1]));
      a[g][2 * t + 8 + half] = value(dtype, bits(operand[lane][2]));
      a[g + 8][2 * t + 8 + half] = value(dtype, bits(operand[lane][3]));
      b[2 * t + half][g] = value(dtype, bits(x[lane][0]));
      b[2 * t + 8 + half][g] = value(dtype, bits(x[lane][1]));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) sums[lane][i] += a[g + 8 * (i / 2)][k] * b[k][2 * t + i % 2];
  }
}

struct Call {
  Nf4Weight q;
  PackedWords packed;
  float offset;
};

template <int dtype, Rows kind>
void decode_chunk(const Call& call, const Chunk<kind>& chunk, bool live, bool planes, int lane, Warp (&words)[4]) {
  const DecodedRows<dtype, kind> rows(chunk, call.q, call.q.nested_map, call.offset, live, planes);
  for (int i = 0; i < 4; ++i) rows.decode(table(), lane, i, words[i].upper[lane], words[i].lower[lane]);
}

template <int dtype, Rows kind>
void weights(const Call& call, int planes, uint16_t* out) {
  const Nf4Weight& q = call.q;
  for (int row = 0; row < q.n; row += kUnitRows)
    for (int column = 0; column < q.k; column += kStepColumns)
      for (int lane = 0; lane < kLanes; ++lane) {
        const int first = column + lane_column(lane);
        // A row above, so that the step down from the origin is taken.
        const int up = row >= kUnitRows ? kUnitRows : 0;
        const Origin<kind> origin(q, call.packed, row - up + lane_row(lane), first);
        Chunk<kind> chunk;
        chunk.load(q, call.packed, origin, up);
        Warp words[4];
        decode_chunk<dtype, kind>(call, chunk, first < q.k, planes, lane, words);
        for (int e = 0; e < kLaneWeights && first + e < q.k; ++e)
          for (int h = 0; h < 2; ++h) {
            const auto& pairs = h == 0 ? words[e / 8].upper[lane] : words[e / 8].lower[lane];
            const int64_t at = row + lane_row(lane) + 8 * h;
            if (at < q.n) out[at * q.k + first + e] = static_cast<uint16_t>(pairs[e % 8 / 2] >> (16 * (e % 2)));
          }
      }
}

// The sums of a warp: of its units and of the 8 tokens of a fragment, four in each lane.
struct Sums {
  double values[kGroupUnits][2][kLanes][4] = {};
};

// A step of a warp: the product of `units` times 16 rows and 128 columns with x.
template <int dtype, Rows kind>
void multiply_step(const Call& call, const Nf4Plan& plan, const Share& share, Position at, int m, const uint16_t* x,
                   Sums& sums) {
  const Nf4Weight& q = call.q;
  for (int u = 0; u < share.units; ++u) {
    Warp words[4];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int column = at.step * kStepColumns + lane_column(lane);
      const int row = at.tile * plan.units * kUnitRows + unit_row(plan, share.group, 0) + lane_row(lane);
      const Origin<kind> origin(q, call.packed, row, column);
      Chunk<kind> chunk;
      chunk.load(q, call.packed, origin, unit_row(plan, 0, u));
      decode_chunk<dtype, kind>(call, chunk, column < q.k, by_planes(u), lane, words);
    }
    for (int f = 0; 8 * f < m; ++f)
      for (int i = 0; i < 4; ++i)
        for (int product = 0; product < 2; ++product) {
          uint32_t operand[kLanes][4], right[kLanes][2] = {};
          for (int lane = 0; lane < kLanes; ++lane) {
            first_operand(words[i].upper[lane], words[i].lower[lane], product, operand[lane]);
            const int token = 8 * f + lane_token(lane);
            const int column = at.step * kStepColumns + lane_column(lane) + 8 * i + 4 * product;
            for (int e = 0; e < 4 && token < m; ++e)
              if (column + e < q.k)
                right[lane][e / 2] |= static_cast<uint32_t>(x[token * q.k + column + e]) << (16 * (e % 2));
          }
          multiply(dtype, operand, right, sums.values[u][f]);
        }
  }
}

// Adds a block's warps up through the buffer and adds the tile's rows to y: with splits several blocks do.
void add_warps(const Nf4Plan& plan, int tile, int64_t n, int m, const Sums (&sums)[kPlanWarps], double* y) {
  const int tokens = m <= 8 ? 8 : 16, rows = plan.units * kUnitRows, at_once = kTokensAtOnce / tokens;
  for (int unit = 0; unit < kGroupUnits; unit += at_once) {
    std::vector<double> buffer(kBufferNumel, std::nan(""));
    for (int warp = 0; warp < kPlanWarps; ++warp)
      for (int u = 0; u < at_once; ++u)
        for (int token = 0; token < tokens; token += 8)
          for (int lane = 0; lane < kLanes; ++lane)
            for (int i = 0; i < 4; ++i)
              buffer.at(buffer_offset(warp, u, token + result_token(lane, i), result_row(lane, i), tokens)) =
                  sums[warp].values[unit + u][token / 8][lane][i];
    for (int i = 0; i < sums_in_round(plan, tokens, m); ++i) {
      const Sum which = sum_of(plan, unit, tokens, i);
      const int64_t row = static_cast<int64_t>(tile) * rows + which.row;
      if (which.row >= rows || row >= n) continue;
      for (int slot = 0; slot < kPlanWarps / plan.groups; ++slot)
        y[which.token * n + row] += buffer.at(which.source + buffer_offset(slot * plan.groups, 0, 0, 0, tokens));
    }
  }
}

// y [m, n] = x W^T as the warps of all blocks make it, in double.
template <int dtype, Rows kind>
void linear(const Call& call, const Nf4Plan& plan, int m, const uint16_t* x, double* y) {
  for (int block = 0; block < plan.blocks; ++block) {
    std::vector<Share> shares;
    std::vector<Position> ahead;
    for (int warp = 0; warp < kPlanWarps; ++warp) {
      shares.emplace_back(plan, block, warp);
      ahead.push_back(shares[warp].begin(plan, block));
    }
    for (int tile = block / plan.splits; tile < plan.tiles; tile += shares[0].tile_step) {
      Sums sums[kPlanWarps];
      for (int warp = 0; warp < kPlanWarps; ++warp)
        for (; ahead[warp].tile == tile; shares[warp].advance(ahead[warp]))
          multiply_step<dtype, kind>(call, plan, shares[warp], ahead[warp], m, x, sums[warp]);
      add_warps(plan, tile, call.q.n, m, sums, y);
    }
  }
}

// Calls `function` with the element type and the kind of rows as constants; any rows where `any` is set or they are not
// aligned.
template <class Function>
int chosen(int dtype, const Nf4Weight& q, int any, Function function) {
  const Rows kind = any || !rows_are_aligned(q) ? kAnyRows : q.nested_absmax != nullptr ? kNestedRows : kPlainRows;
  const auto typed = [&](auto type) {
    constexpr int t = decltype(type)::value;
    if (kind == kPlainRows) function(std::integral_constant<int, t>{}, std::integral_constant<Rows, kPlainRows>{});
    if (kind == kNestedRows) function(std::integral_constant<int, t>{}, std::integral_constant<Rows, kNestedRows>{});
    if (kind == kAnyRows) function(std::integral_constant<int, t>{}, std::integral_constant<Rows, kAnyRows>{});
  };
  if (dtype == kBFloat16) typed(std::integral_constant<int, kBFloat16>{});
  else typed(std::integral_constant<int, kFloat16>{});
  return kind;
}

Call call_of(const int64_t* layout, const void* const* tensors) {
  const auto* nested_offset = static_cast<const float*>(tensors[4]);
  const Nf4Weight q{layout[0], layout[1], layout[2], layout[3], __builtin_ctzll(static_cast<uint64_t>(layout[4])),
                    static_cast<const uint8_t*>(tensors[0]), tensors[1], static_cast<const float*>(tensors[2]),
                    static_cast<const float*>(tensors[3]), nested_offset};
  Call call{q, packed_words(q, layout[5]), nested_offset != nullptr ? *nested_offset : 0.0f};
  call.packed.read_last_word();
  return call;
}

}  // namespace

// A layout is n, k, row stride, first element, blocksize, bytes of `packed`; tensors are the weight's five.
extern "C" {

int nf4_weights(int dtype, const int64_t* layout, const void* const* tensors, int any, int planes, uint16_t* out) {
  const Call call = call_of(layout, tensors);
  if (!nf4_fits(call.q)) return -1;
  return chosen(dtype, call.q, any, [&](auto type, auto kind) {
    weights<decltype(type)::value, decltype(kind)::value>(call, planes, out);
  });
}

int nf4_linear(int dtype, const int64_t* layout, const void* const* tensors, int any, const int* plan, int m,
               const uint16_t* x, double* y) {
  const Call call = call_of(layout, tensors);
  const Nf4Plan divided{plan[0], plan[1], plan[2], plan[3], plan[4], plan[5], plan[6]};
  return chosen(dtype, call.q, any, [&](auto type, auto kind) {
    linear<decltype(type)::value, decltype(kind)::value>(call, divided, m, x, y);
  });
}

void nf4_plan_of(int64_t n, int64_t k, const int* counts, int* plan) {
  ClustersAtOnce clusters;
  std::memcpy(clusters.count, counts, sizeof clusters.count);
  const Nf4Plan p = nf4_plan(n, k, clusters);
  const int values[] = {p.units, p.groups, p.splits, p.steps, p.steps_per_split, p.tiles, p.blocks};
  std::memcpy(plan, values, sizeof values);
}

}
