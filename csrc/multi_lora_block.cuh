// What a block of the multi-adapter decode kernel does, in terms of a *machine*: the device's (multi_lora_linear.cu),
// or the tests', which runs the threads of a cluster on the host. multi_lora.h says how the work is divided.
//
// Everything that is known early is asked for early: the first tile of B and y goes to shared memory by asynchronous
// copies before A is read. (Loads to registers would sink below the exchange; copies stay where they are written.)
#pragma once

#include <cmath>
#include <type_traits>

#include "multi_lora.h"

#if defined(__CUDACC__)
#define PEFT_KERNELS_ON_MACHINE __device__ __forceinline__
#define PEFT_KERNELS_NO_UNROLL _Pragma("unroll 1")
#else
#define PEFT_KERNELS_ON_MACHINE inline
#define PEFT_KERNELS_NO_UNROLL
#endif

namespace peft_kernels {

// Where a block is. Asked for anew wherever it is needed: kept in registers it would cost the loads of A theirs.
struct Place {
  int token, projection, part;
};

struct alignas(16) Words {
  uint32_t w[4];
};

// An adapter in a layer, a row of the table. r = 0: it has nothing there.
struct TableRow {
  const char *A, *B;
  int r;
  float scaling;
  int A_stride, B_stride;
};

// A row of the table, none where the id is out of range.
template <class Machine>
PEFT_KERNELS_ON_MACHINE TableRow find_adapter(Machine& machine, const MultiLoraArguments& a, int token,
                                              int layer, int choice) {
  const int64_t id = machine.template load<int64_t>(a.ids + static_cast<int64_t>(token) * a.choices + choice);
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(a.adapters)) return {};
  const int64_t* row = a.table + id * a.adapter_stride + layer * kTableWords;
  const Words first = machine.load16(row), second = machine.load16(row + 2);
  const auto address = [](uint32_t low, uint32_t high) {
    return reinterpret_cast<const char*>(static_cast<uintptr_t>(high) << 32 | low);
  };
  return {address(first.w[0], first.w[1]), address(first.w[2], first.w[3]),
          least(static_cast<int>(second.w[0]), kMostRank), bits_to_float(second.w[1]),
          static_cast<int>(second.w[2]), static_cast<int>(second.w[3])};
}

// The B of a round, as the second half of the kernel finds it in shared memory.
struct alignas(16) Panel {
  const char* B;
  int stride, ranks;
};

// A round: ranks from `rank` on of a choice, whose adapter has `r`. `number` counts the rounds of a token. The adapter
// is looked up again for each round: kept in registers it would cost the loads of A their own.
template <class Shape>
struct Round {
  int choice, rank, number, r;

  // The first round; returns its adapter.
  template <class Machine>
  PEFT_KERNELS_ON_MACHINE TableRow begin(Machine& machine, const MultiLoraArguments& a, int token, int layer) {
    choice = number = rank = 0;
    return find(machine, a, token, layer);
  }

  PEFT_KERNELS_ON_MACHINE bool done(const MultiLoraArguments& a) const { return choice >= a.choices; }
  PEFT_KERNELS_ON_MACHINE int ranks() const { return least(r - rank, Shape::bucket); }
  PEFT_KERNELS_ON_MACHINE Panel panel(const TableRow& adapter) const {
    return {adapter.B + static_cast<int64_t>(rank) * Shape::kSize, adapter.B_stride, ranks()};
  }

  PEFT_KERNELS_ON_MACHINE void advance() {
    ++number;
    rank += Shape::bucket;
    if (rank < r) return;
    rank = 0;
    ++choice;
  }

  // The adapter of this round, or of the next one that has any.
  template <class Machine>
  PEFT_KERNELS_ON_MACHINE TableRow find(Machine& machine, const MultiLoraArguments& a, int token, int layer) {
    PEFT_KERNELS_NO_UNROLL
    for (; choice < a.choices; ++choice) {
      const TableRow adapter = find_adapter(machine, a, token, layer, choice);
      r = adapter.r;
      if (r > 0) return adapter;
    }
    return {};
  }
};

// Calls take(e, value) with the numbers of 16 bytes.
template <int type, class Take>
PEFT_KERNELS_ON_MACHINE void each(const Words& words, Take take) {
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (type == kFloat32) {
      take(i, bits_to_float(words.w[i]));
    } else {
      take(2 * i, low_half<type>(words.w[i]));
      take(2 * i + 1, high_half<type>(words.w[i]));
    }
  }
}

template <int type, class Machine>
PEFT_KERNELS_ON_MACHINE float load_number(Machine& machine, const char* base, int64_t index) {
  if constexpr (type == kFloat32) {
    return bits_to_float(machine.template load<uint32_t>(base + 4 * index));
  } else {
    return low_half<type>(machine.template load<uint16_t>(base + 2 * index));
  }
}

PEFT_KERNELS_ON_MACHINE bool is_vector(const char* base, int64_t stride_bytes) {
  return ((reinterpret_cast<uintptr_t>(base) | static_cast<uintptr_t>(stride_bytes)) & (kChunkBytes - 1)) == 0;
}

// The rank of a warp whose sum a lane has after `add_lanes`.
template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE int lane_rank(Machine& machine) {
  return machine.warp() * Shape::kWarpRanks + machine.thread() % 32 / (32 / Shape::kWarpRanks);
}

// Adds each of a warp's sums over its lanes: half of the lanes keep half of the sums until each has one.
template <int count, int distance, class Machine>
PEFT_KERNELS_ON_MACHINE float add_lanes(Machine& machine, const float (&sums)[count]) {
  if constexpr (count == 1) {
    float sum = sums[0];
    PEFT_KERNELS_UNROLL
    for (int d = distance; d > 0; d /= 2) sum += machine.from_lane_xor(sum, d);
    return sum;
  } else {
    const bool upper = (machine.thread() & distance) != 0;
    float kept[count / 2];
    PEFT_KERNELS_UNROLL
    for (int q = 0; q < count / 2; ++q) {
      const float given = upper ? sums[q] : sums[q + count / 2];
      kept[q] = (upper ? sums[q + count / 2] : sums[q]) + machine.from_lane_xor(given, distance);
    }
    return add_lanes<count / 2, distance / 2>(machine, kept);
  }
}

// sums[q] += x A^T of `steps` chunks of a lane, for the ranks of its warp; `last` is the last of them that is there. It
// is read once more in place of those that are not: loads under conditions would be issued after the first sums.
template <class Shape, int steps, class Machine>
PEFT_KERNELS_ON_MACHINE void multiply_chunks(Machine& machine, const char* A, int64_t stride, int last, const char* x,
                                             float (&sums)[Shape::kWarpRanks]) {
  constexpr int kRanks = Shape::kWarpRanks, kWidth = Shape::kWidth;
  Words left[kRanks][steps], right[steps];
  PEFT_KERNELS_UNROLL
  for (int q = 0; q < kRanks; ++q) {
    const char* from = A + least(q, last) * stride;
    PEFT_KERNELS_UNROLL
    for (int step = 0; step < steps; ++step) left[q][step] = machine.load16_once(from + step * 32 * kChunkBytes);
  }
  PEFT_KERNELS_UNROLL
  for (int step = 0; step < steps; ++step) right[step] = machine.template load_x<kWidth>(x + step * 64 * kWidth);
  PEFT_KERNELS_UNROLL
  for (int step = 0; step < steps; ++step) {
    float values[8];
    each<Shape::x_type>(right[step], [&](int e, float value) { values[e] = value; });
    PEFT_KERNELS_UNROLL
    for (int q = 0; q < kRanks; ++q)
      each<Shape::a_type>(left[q][step], [&](int e, float value) { sums[q] = fmaf(values[e], value, sums[q]); });
  }
}

// The sum of x A^T over a block's chunks for `lane_rank`, of ranks that are there. A lane adds its chunks one after the
// other in all forms: alignment does not change a bit.
template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE float shrink(Machine& machine, const MultiLoraArguments& a, const Round<Shape>& round,
                                     const char* A, int A_stride) {
  constexpr int kRanks = Shape::kWarpRanks, kWidth = Shape::kWidth, kSteps = Shape::kSteps;
  const Place place = machine.place();
  const char* x = a.x + place.token * a.x_stride * 2;
  const int all = ceil_div(a.k, Shape::kWidth);
  const Range chunks = Machine::kClusters ? part_of(all, place.part, a.chunk_share) : Range{0, all};
  const int lane = machine.thread() % 32, first_rank = machine.warp() * kRanks;
  const int last = least(round.ranks() - first_rank, kRanks) - 1;
  const int64_t stride = static_cast<int64_t>(A_stride) * Shape::kSize;
  const bool vector = a.x_vector && is_vector(A, stride);
  A += (round.rank + first_rank) * stride;
  float sums[kRanks] = {};
  if (last >= 0 && vector) {
    A += (chunks.first + lane) * static_cast<int64_t>(kChunkBytes);
    x += (chunks.first + lane) * static_cast<int64_t>(2 * kWidth);
    int count = chunks.last - chunks.first - lane;  // this lane's are each 32nd of them
    PEFT_KERNELS_NO_UNROLL
    for (; count > 32 * (kSteps - 1); count -= 32 * kSteps) {
      multiply_chunks<Shape, kSteps>(machine, A, stride, last, x, sums);
      A += kSteps * 32 * kChunkBytes;
      x += kSteps * 64 * kWidth;
    }
    PEFT_KERNELS_NO_UNROLL
    for (; count > 0; count -= 32) {
      multiply_chunks<Shape, 1>(machine, A, stride, last, x, sums);
      A += 32 * kChunkBytes;
      x += 64 * kWidth;
    }
  } else if (last >= 0) {
    PEFT_KERNELS_NO_UNROLL
    for (int chunk = chunks.first + lane; chunk < chunks.last; chunk += 32) {
      const int end = least(kWidth * (chunk + 1), a.k);
      PEFT_KERNELS_NO_UNROLL
      for (int column = kWidth * chunk; column < end; ++column) {
        const float value = load_number<Shape::x_type>(machine, x, column);
        PEFT_KERNELS_UNROLL
        for (int q = 0; q < kRanks; ++q) {
          const float other = load_number<Shape::a_type>(machine, A + least(q, last) * stride, column);
          sums[q] = fmaf(value, other, sums[q]);
        }
      }
    }
  }
  return add_lanes<kRanks, 16>(machine, sums);
}

// Sends a warp's sums to all blocks of the cluster, a lane to one block, and adds theirs: thread j has the sum of rank
// j.
template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE float exchange(Machine& machine, const Round<Shape>& round, float sum) {
  constexpr int bucket = Shape::bucket, kLanes = 32 / Shape::kWarpRanks;
  static_assert(kLanes >= kTeam, "a lane for each block");
  const int thread = machine.thread(), to = thread % kLanes, ranks = round.ranks();
  // Two sets in turn: a block that is a round ahead writes beside what another still reads. Nobody is two ahead, since
  // the sums of the next round come from all blocks, after they have read those of this one.
  const int set = round.number & 1, slots = Shape::kSlots + set * kTeam * bucket * 4;
  if (thread == 0) machine.expect(set, kTeam * ranks * 4);
  if (round.number == 0) machine.team_wait();  // all blocks run, and their barriers are there
  const int rank = lane_rank<Shape>(machine), part = machine.place().part;
  if (to < kTeam && rank < ranks) machine.send(to, slots + (part * bucket + rank) * 4, sum, set);
  machine.wait(set, round.number >> 1 & 1);
  if (thread >= ranks) return 0.0f;
  float total = 0.0f;
  PEFT_KERNELS_UNROLL
  for (int source = 0; source < kTeam; ++source)
    total += machine.template shared<float>(slots + (source * bucket + thread) * 4);
  return total;
}

// Stores the coefficients of all rounds, w s_a (x A^T): the sums over the whole of K, scaled in float32. And their
// panels; returns how many there are.
template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE int make_coefficients(Machine& machine, const MultiLoraArguments& a, Round<Shape> round,
                                              TableRow adapter) {
  constexpr int bucket = Shape::bucket;
  const int thread = machine.thread();
  PEFT_KERNELS_NO_UNROLL
  for (;;) {
    if (thread == 0) machine.template shared<Panel>(Shape::panel(a.choices, round.number)) = round.panel(adapter);
    const float sum = shrink<Shape>(machine, a, round, adapter.A, adapter.A_stride);
    const Place place = machine.place();
    float scale = adapter.scaling;
    const int64_t mixed = static_cast<int64_t>(place.token) * a.choices + round.choice;
    if (a.mix != nullptr)
      scale *= bits_to_float(machine.template load<uint32_t>(a.mix + mixed));
    const int to = Shape::kCoefficients + round.number * bucket * 4;
    if constexpr (Machine::kClusters) {
      const float total = exchange<Shape>(machine, round, sum);
      if (thread < bucket) machine.template shared<float>(to + thread * 4) = scale * total;
    } else if (thread % (32 / Shape::kWarpRanks) == 0) {
      const int rank = lane_rank<Shape>(machine);
      machine.template shared<float>(to + rank * 4) = rank < round.ranks() ? scale * sum : 0.0f;
    }
    round.advance();
    if (round.done(a)) return round.number;
    adapter = round.find(machine, a, place.token, a.projections[place.projection].layer);
    if (round.done(a)) return round.number;
    if constexpr (Machine::kClusters) machine.sync();  // every thread has read the slots of this round
  }
}

// Asks for a panel's rows of B, and with the first panel for their y.
template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE void ask_for(Machine& machine, bool vector, const char* y, Range rows, const Panel& panel,
                                     bool first, int stage) {
  constexpr int kUnits = Shape::kUnits, kWidth = Shape::kWidth, kThreads = Shape::kThreads;
  const int thread = machine.thread(), count = rows.count(), at = stage + Shape::kStageY;
  const int64_t stride = static_cast<int64_t>(panel.stride) * Shape::kSize;
  const char* B = panel.B + rows.first * stride;
  if (is_vector(panel.B, stride)) {
    constexpr int kStep = kThreads / kUnits;  // rows that all threads ask for at once; `place` has their period
    const int row = thread / kUnits, unit = thread % kUnits;
    const int left = (panel.ranks - unit * kWidth) * Shape::kSize, to = at + Shape::place(row, unit) * kChunkBytes;
    const char* from = B + row * stride + unit * kChunkBytes;
    if (left >= kChunkBytes) {
      PEFT_KERNELS_UNROLL
      for (int i = 0; i < Shape::kTileRows / kStep; ++i, from += kStep * stride)
        if (row + i * kStep < count) machine.copy(to + i * kThreads * kChunkBytes, from);
    } else if (left > 0) {
      PEFT_KERNELS_NO_UNROLL
      for (int i = 0; row + i * kStep < count; ++i, from += kStep * stride)
        machine.copy_part(to + i * kThreads * kChunkBytes, from, left);
    }
  } else {
    PEFT_KERNELS_NO_UNROLL
    for (int i = thread; i < count * Shape::bucket; i += kThreads) {
      const int row = i / Shape::bucket, rank = i % Shape::bucket;
      const int to = at + Shape::place(row, rank / kWidth) * kChunkBytes + rank % kWidth * Shape::kSize;
      using Bits = std::conditional_t<Shape::a_type == kFloat32, uint32_t, uint16_t>;
      Bits bits = 0;
      if (rank < panel.ranks) bits = machine.template load<Bits>(B + row * stride + rank * Shape::kSize);
      machine.template shared<Bits>(to) = bits;
    }
  }
  if (!first) return;
  y += rows.first * 2LL;
  if (vector) {
    for (int i = thread; 8 * i < count; i += kThreads) machine.copy(stage + i * kChunkBytes, y + i * kChunkBytes);
  } else {
    PEFT_KERNELS_NO_UNROLL
    for (int i = thread; i < count; i += kThreads)
      machine.template shared<uint16_t>(stage + 2 * i) = machine.template load<uint16_t>(y + 2 * i);
  }
}

// Adds a tile of B times the coefficients of its round to this thread's rows.
template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE void expand(Machine& machine, int coefficients, int ranks, int stage,
                                    float (&values)[Shape::kRows]) {
  const int at = stage + Shape::kStageY, units = ceil_div(ranks, Shape::kWidth);
  const int row = machine.thread() * Shape::kRows;
  PEFT_KERNELS_UNROLL
  for (int unit = 0; unit < Shape::kUnits; ++unit) {
    if (unit >= units) break;
    float c[Shape::kWidth];
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < Shape::kWidth / 4; ++i)
      each<kFloat32>(machine.template shared<Words>(coefficients + (unit * Shape::kWidth + 4 * i) * 4),
                     [&](int e, float value) { c[4 * i + e] = value; });
    PEFT_KERNELS_UNROLL
    for (int i = 0; i < Shape::kRows; ++i)
      each<Shape::a_type>(machine.template shared<Words>(at + Shape::place(row + i, unit) * kChunkBytes),
                          [&](int e, float value) { values[i] = fmaf(c[e], value, values[i]); });
  }
}

template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE void load_y(Machine& machine, int stage, float (&values)[Shape::kRows]) {
  const int from = stage + machine.thread() * Shape::kRows * 2;
  if constexpr (Shape::kRows == 2) {
    const uint32_t word = machine.template shared<uint32_t>(from);
    values[0] = low_half<Shape::x_type>(word);
    values[1] = high_half<Shape::x_type>(word);
  } else {
    values[0] = low_half<Shape::x_type>(machine.template shared<uint16_t>(from));
  }
}

template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE void store_y(Machine& machine, bool vector, char* y, Range rows,
                                     const float (&values)[Shape::kRows]) {
  const int row = rows.first + machine.thread() * Shape::kRows;
  const uint32_t word = pack<Shape::x_type>(values[0], values[Shape::kRows - 1]);
  if (Shape::kRows == 2 && vector) {
    machine.template store<uint32_t>(y + row * 2LL, word);
    return;
  }
  PEFT_KERNELS_UNROLL
  for (int i = 0; i < Shape::kRows; ++i)
    if (row + i < rows.last)
      machine.template store<uint16_t>(y + (row + i) * 2LL, static_cast<uint16_t>(word >> (16 * i)));
}

// The parts of a token in a projection that this block has, `tiles` times `rounds`, in the order in which they are
// added.
struct Item {
  int tile = 0, round = 0, stage = 0;
  PEFT_KERNELS_ON_MACHINE void advance(int rounds, int stages) {
    stage = stages == 2 ? stage ^ 1 : 0;
    if (++round < rounds) return;
    round = 0;
    ++tile;
  }
};

// What a block knows of its rows of B and y.
template <class Shape, class Machine>
struct Target {
  const MultiLoraArguments& a;
  const MultiLoraProjection& p;
  Range rows;
  char* y;

  PEFT_KERNELS_ON_MACHINE Target(const MultiLoraArguments& a, const Place& place)
      : a(a), p(a.projections[place.projection]), rows(part_of(p.n, place.part, p.share)),
        y(p.y + static_cast<int64_t>(place.token) * p.n * 2) {}

  PEFT_KERNELS_ON_MACHINE int tiles() const { return ceil_div(rows.count(), Shape::kTileRows); }
  PEFT_KERNELS_ON_MACHINE Range tile(int number) const {
    const int first = rows.first + number * Shape::kTileRows;
    return {first, least(first + Shape::kTileRows, rows.last)};
  }
  PEFT_KERNELS_ON_MACHINE int stage(int number) const { return Shape::stages_at(a.choices) + number * Shape::kStage; }

  PEFT_KERNELS_ON_MACHINE void ask_for(Machine& machine, const Item& item, const Panel& panel) const {
    peft_kernels::ask_for<Shape>(machine, p.vector, y, tile(item.tile), panel, item.round == 0, stage(item.stage));
    machine.commit();
  }
};

// The first half: asks for the first tiles and makes the coefficients. Returns how many rounds there are, and in
// `asked` how many tiles were asked for.
template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE int multi_lora_down(Machine& machine, const MultiLoraArguments& a, int& asked) {
  const Place place = machine.place();
  Round<Shape> head{};
  const TableRow adapter = head.begin(machine, a, place.token, a.projections[place.projection].layer);
  if (head.done(a)) return 0;  // in all blocks of the team
  machine.team_begin();
  const Target<Shape, Machine> target(a, place);
  // Of a single round the second tile is known too; else what comes next is found by the second half.
  const bool single = a.choices == 1 && head.r <= Shape::bucket;
  const int early = least(target.tiles(), single ? a.stages : 1);
  PEFT_KERNELS_NO_UNROLL
  for (asked = 0; asked < early; ++asked) target.ask_for(machine, {asked, 0, asked}, head.panel(adapter));
  return make_coefficients<Shape>(machine, a, head, adapter);
}

// The second half: y += coefficients times B, tile by tile.
template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE void multi_lora_up(Machine& machine, const MultiLoraArguments& a, int rounds, int asked) {
  const Target<Shape, Machine> target(a, machine.place());
  const int tiles = target.tiles();
  Item item, next;
  PEFT_KERNELS_NO_UNROLL
  for (int i = 0; i < asked; ++i) next.advance(rounds, a.stages);
  float values[Shape::kRows] = {};
  PEFT_KERNELS_NO_UNROLL
  for (int taken = 0; item.tile < tiles; ++taken) {
    if (next.tile < tiles && asked < taken + a.stages) {
      machine.sync();  // the panels are there, and every thread has read the stage that is filled again
      PEFT_KERNELS_NO_UNROLL
      for (; next.tile < tiles && asked < taken + a.stages; ++asked) {
        target.ask_for(machine, next, machine.template shared<Panel>(Shape::panel(a.choices, next.round)));
        next.advance(rounds, a.stages);
      }
    }
    machine.wait_for_copies(asked - taken - 1);
    machine.sync();
    const Range tile = target.tile(item.tile);
    const int stage = target.stage(item.stage), round = item.round, current = item.tile;
    item.advance(rounds, a.stages);
    if (machine.thread() * Shape::kRows >= tile.count()) continue;
    if (round == 0) load_y<Shape>(machine, stage, values);
    const int ranks = machine.template shared<Panel>(Shape::panel(a.choices, round)).ranks;
    expand<Shape>(machine, Shape::kCoefficients + round * Shape::bucket * 4, ranks, stage, values);
    if (item.tile != current) store_y<Shape>(machine, target.p.vector, target.y, tile, values);
  }
}

template <class Shape, class Machine>
PEFT_KERNELS_ON_MACHINE void multi_lora_block(Machine& machine, const MultiLoraArguments& a) {
  int asked = 0;
  const int rounds = multi_lora_down<Shape>(machine, a, asked);
  if (rounds > 0) multi_lora_up<Shape>(machine, a, rounds, asked);
}

}  // namespace peft_kernels
