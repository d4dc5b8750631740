// How the work of the multi-adapter decode kernel is divided: what the host, the device and the tests agree on.
//
// y_j[m] += sum over i of w[m, i] s_a (x[m] A_aj^T) B_aj^T with a = ids[m, i]. A *team* of blocks serves one token in
// one projection. Each block has a range of rows of B, and so of y. From sm_90 on a team is a cluster of 8 blocks that
// also divide the columns of A and send each other what they summed; before, each block of a team reads all of A.
//
// Adapters come in *rounds* of at most `bucket` ranks: choice after choice, and of each its ranks from 0 on. A range of
// rows comes in *tiles*. All sums have one order, which depends neither on the bucket nor on other tokens.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device_numeric.h"

namespace peft_kernels {

constexpr int kTeam = 8;  // blocks of a cluster: the most that every GPU with clusters has
constexpr int kMostTokens = 65535, kMostChoices = 8, kMostRank = 512, kMostProjections = 8;
constexpr int kChunkBytes = 16;  // of a row of A that a lane loads at once, of a row of B that a thread does
constexpr int kTableWords = 4;   // of 8 bytes: formats/adapter_table.py

// y_j [tokens, n_j], contiguous += what the adapters of each token add to it. x [tokens, k] and y are
// bfloat16 or float16, A and B either or float32. ids [tokens, choices] and mix, null for ones, are contiguous; `rank`:
// the largest that is expected of an adapter, which makes it fast, while all up to 512 are computed.
struct MultiLora {
  int64_t tokens;
  int k, choices, projections, rank;
  int x_type, a_type;
  const void* x;
  int64_t x_stride;
  const int64_t* ids;
  const float* mix;
  const int64_t* table;  // rows of 4 words: formats/adapter_table.py
  int64_t adapters, adapter_stride;
  struct Projection {
    void* y;
    int layer, n;
  } projection[kMostProjections];
};

// Rows of y [m, n] are contiguous. `vector`: they begin at multiples of 16 bytes.
struct MultiLoraProjection {
  char* y;
  int layer, n, share;  // of the table; rows; those of a block of the team
  bool vector;
};

struct MultiLoraArguments {
  const char* x;
  int64_t x_stride;
  int k;
  bool x_vector;  // rows of x begin at multiples of 16 bytes and are such multiples long
  const int64_t* ids;
  const float* mix;  // null: every weight is 1
  int choices;
  const int64_t* table;
  int64_t adapters, adapter_stride;  // in words
  int chunk_share;                   // chunks of a row of A of a block of the team
  int stages;                        // tiles of B at once in shared memory
  MultiLoraProjection projections[kMostProjections];
};

struct Range {
  int first, last;
  PEFT_KERNELS_HOST_DEVICE int count() const { return greatest(last - first, 0); }
};

PEFT_KERNELS_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What each of `parts` takes of `count`, in multiples of 8 (a line of memory in chunks, 16 bytes in rows of y): the
// last ones take less, or nothing.
PEFT_KERNELS_HOST_DEVICE int share_of(int count, int parts) { return ceil_div(ceil_div(count, parts), 8) * 8; }

PEFT_KERNELS_HOST_DEVICE Range part_of(int count, int part, int share) {
  const int first = least(part * share, count);
  return {first, least(first + share, count)};
}

// What a kernel is compiled for.
template <int x_type_, int a_type_, int bucket_>
struct MultiLoraShape {
  static constexpr int x_type = x_type_, a_type = a_type_, bucket = bucket_;
  static constexpr int kSize = a_type == kFloat32 ? 4 : 2;
  static constexpr int kThreads = bucket == 64 ? 512 : 256, kWarps = kThreads / 32;
  // Blocks at once on a multiprocessor that the registers must allow for.
  static constexpr int kResident = bucket == 64 ? 2 : bucket == 16 && a_type != kFloat32 ? 4 : 3;
  // Of A: a warp has some of the rows, its lanes chunks of them in turn, `kSteps` at once.
  static constexpr int kWidth = kChunkBytes / kSize;
  static constexpr int kWarpRanks = bucket / kWarps;
  static constexpr int kSteps = bucket == 64 ? 1 : bucket == 16 && a_type == kFloat32 ? 4 : 2;
  // Of B: a row is `kUnits` of 16 bytes in shared memory, a thread takes `kRows` rows that follow each other.
  static constexpr int kUnits = bucket / kWidth;
  static constexpr int kRows = bucket == 64 ? 1 : 2;
  static constexpr int kTileRows =
      kRows * kThreads * bucket * kSize <= 64 << 10 ? kRows * kThreads : (64 << 10) / (bucket * kSize);
  // Shared memory: two barriers, two times the parts of a round from each block, the coefficients and panels of all
  // rounds, and the stages, each a tile of y and one of B.
  static constexpr int kSlots = 16;
  static constexpr int kCoefficients = kSlots + 2 * kTeam * bucket * 4;
  static constexpr int kStageY = kTileRows * 2, kStage = kStageY + kTileRows * kUnits * kChunkBytes;
  static PEFT_KERNELS_HOST_DEVICE int panel(int choices, int round) {
    return kCoefficients + choices * kMostRank * 4 + round * 16;
  }
  static PEFT_KERNELS_HOST_DEVICE int stages_at(int choices) { return panel(choices, choices * (kMostRank / bucket)); }
  static PEFT_KERNELS_HOST_DEVICE int shared_bytes(int choices, int stages) {
    return stages_at(choices) + stages * kStage;
  }

  // Where a unit of a tile lies in shared memory, so that neither consecutive units nor one unit of the rows of 8
  // threads share a bank.
  static PEFT_KERNELS_HOST_DEVICE int place(int row, int unit) {
    constexpr int shift = kRows * kUnits <= 8 ? 3 : kRows * kUnits == 16 ? 4 : 5;
    static_assert(kRows * kUnits <= 32 && (kThreads >> shift) % 8 == 0, "a shift for each, and a period of kThreads");
    const int number = row * kUnits + unit;
    return number ^ (number >> shift & 7);
  }
};

// Tiles of B at once in shared memory: two where there are two and they fit what every GPU from sm_80 on has.
template <class Shape>
PEFT_KERNELS_HOST_DEVICE int stages_for(int rows, int choices) {
  return rows > Shape::kTileRows && Shape::shared_bytes(choices, 2) <= 99 << 10 ? 2 : 1;
}

// Blocks of a team where there are no clusters: enough for two on each multiprocessor, each with rows for its threads.
// Results do not depend on it.
PEFT_KERNELS_HOST_DEVICE int team_without_clusters(int64_t teams, int n, int multiprocessors) {
  const int64_t wanted = (2LL * multiprocessors + teams - 1) / greatest<int64_t>(teams, 1);
  return static_cast<int>(greatest<int64_t>(least<int64_t>(wanted, ceil_div(n, 256)), 1));
}

inline int most_rows(const MultiLora& call) {
  int most = 0;
  for (int j = 0; j < call.projections; ++j) most = greatest(most, call.projection[j].n);
  return most;
}

// Whether the kernel can be launched on this.
inline bool multi_lora_fits(const MultiLora& call) {
  return call.tokens >= 1 && call.tokens <= kMostTokens && call.k >= 1 && call.choices >= 1 &&
         call.choices <= kMostChoices && call.projections >= 1 && call.projections <= kMostProjections &&
         reinterpret_cast<uintptr_t>(call.table) % kChunkBytes == 0;
}

template <class Shape>
MultiLoraArguments multi_lora_arguments(const MultiLora& call, int team) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kChunkBytes == 0; };
  MultiLoraArguments a{};
  a.x = static_cast<const char*>(call.x);
  a.x_stride = call.x_stride;
  a.k = call.k;
  a.x_vector = call.k % 8 == 0 && aligned(call.x) && (call.tokens == 1 || call.x_stride % 8 == 0);
  a.ids = call.ids;
  a.mix = call.mix;
  a.choices = call.choices;
  a.table = call.table;
  a.adapters = call.adapters;
  a.adapter_stride = call.adapter_stride;
  a.chunk_share = share_of(ceil_div(call.k, Shape::kWidth), kTeam);
  a.stages = stages_for<Shape>(share_of(most_rows(call), team), call.choices);
  for (int j = 0; j < call.projections; ++j) {
    const MultiLora::Projection& p = call.projection[j];
    const bool vector = p.n % 8 == 0 && aligned(p.y);
    a.projections[j] = {static_cast<char*>(p.y), p.layer, p.n, share_of(p.n, team), vector};
  }
  return a;
}

// Calls function(Shape{}) with the shape for types and a rank; false where there is none.
template <class Function>
bool with_multi_lora_shape(int x_type, int a_type, int rank, Function function) {
  const auto typed = [&](auto x, auto a) {
    constexpr int kX = decltype(x)::value, kA = decltype(a)::value;
    if (rank <= 16) function(MultiLoraShape<kX, kA, 16>{});
    else if (rank <= 32) function(MultiLoraShape<kX, kA, 32>{});
    else function(MultiLoraShape<kX, kA, 64>{});
    return true;
  };
  const auto with_x = [&](auto x) {
    switch (a_type) {
      case kFloat32: return typed(x, std::integral_constant<int, kFloat32>{});
      case kBFloat16: return typed(x, std::integral_constant<int, kBFloat16>{});
      case kFloat16: return typed(x, std::integral_constant<int, kFloat16>{});
      default: return false;
    }
  };
  switch (x_type) {
    case kBFloat16: return with_x(std::integral_constant<int, kBFloat16>{});
    case kFloat16: return with_x(std::integral_constant<int, kFloat16>{});
    default: return false;
  }
}

}  // namespace peft_kernels
