// The threads of csrc/multi_lora_linear.cu on the host: a team of blocks at a time, each thread a fiber that runs the
// function that the device runs until it has to wait for others. Memory that no argument names must not be read, copies
// and messages come early or as late as they may, and whoever waits for nothing that comes is found.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "multi_lora_block.cuh"

using namespace peft_kernels;

namespace {

constexpr std::size_t kStack = 32 << 10;

// Memory that may be read, and how often each of its bytes was.
struct Region {
  const char* base;
  int64_t bytes;
  int32_t* reads;  // null: not counted
};

enum Fault { kNone, kWildRead, kWildShared, kNotReady, kDeadlock, kSentTooLate, kLeft };

// Kept from one team to the next: to have them anew takes longer than to run on them.
char* stack_of(std::size_t fiber) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= fiber) stacks.emplace_back(new char[kStack]);
  return stacks[fiber].get();
}

struct Message {
  int block, offset, set;
  float value;
};

struct Barrier {
  bool there = false;
  int arrivals = 1, completed = 0;
  int64_t bytes = 0;

  void check() {
    if (arrivals != 0 || bytes != 0) return;
    arrivals = 1;
    ++completed;
  }
};

struct Copy {
  int offset;
  const void* from;
  int bytes;
};

// Entered once by its context, then by jumps, which ask nothing of the operating system.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool begun = false;
  std::vector<std::vector<Copy>> groups{1};
  int block, thread, shuffles = 0, syncs = 0;
  bool ended = false;
  enum { kRuns, kShuffle, kSync, kTeam, kBarrier } waits = kRuns;
  int set = 0, parity = 0;
};

struct Block {
  std::vector<char> shared;
  Barrier barriers[2];
  std::vector<int> shuffled;              // by warp: arrivals
  std::vector<float> values;              // by warp: two sets of 32
  int synced = 0, ended = 0;
};

template <class Shape, bool clusters>
struct Team {
  MultiLoraArguments a;
  Place place;
  std::vector<Region> regions;
  bool late;
  std::mt19937 random;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Message> messages;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  int arrived = 0;
  Fault fault = kNone;

  Team(const MultiLoraArguments& arguments, int size, Place first, std::vector<Region> memory, bool late, unsigned seed)
      : a(arguments), place(first), regions(std::move(memory)), late(late), random(seed), blocks(size),
        fibers(static_cast<std::size_t>(size) * Shape::kThreads) {
    for (Block& block : blocks) {
      block.shared.assign(Shape::shared_bytes(a.choices, a.stages) + 128, static_cast<char>(0xFF));  // NaNs
      block.shuffled.assign(Shape::kWarps, 0);
      block.values.resize(Shape::kWarps * 64);
    }
  }

  void found(Fault what) {
    if (fault == kNone) fault = what;
  }

  __attribute__((noinline)) void pause() {
    if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
  }

  __attribute__((noinline)) void resume(Fiber& f) {
    current = &f;
    if (_setjmp(scheduler) != 0) return;
    if (f.begun) _longjmp(f.at, 1);
    f.begun = true;
    setcontext(&f.context);
  }

  bool ready(const Fiber& f) const {
    const Block& block = blocks[f.block];
    switch (f.waits) {
      case Fiber::kShuffle: return block.shuffled[f.thread / 32] >= 32 * f.shuffles;
      case Fiber::kSync: return block.synced >= Shape::kThreads * f.syncs;
      case Fiber::kTeam: return arrived == static_cast<int>(fibers.size());
      case Fiber::kBarrier: return (block.barriers[f.set].completed & 1) != f.parity;
      default: return true;
    }
  }

  void deliver(const Message& message) {
    Block& block = blocks[message.block];
    if (block.ended == Shape::kThreads) found(kSentTooLate);
    std::memcpy(block.shared.data() + message.offset, &message.value, 4);
    block.barriers[message.set].bytes -= 4;
    block.barriers[message.set].check();
  }

  // All threads to their ends. The warps take turns in an order that is drawn anew each time.
  Fault run();
};

template <class Shape, bool clusters>
struct Machine {
  static constexpr bool kClusters = clusters;
  Team<Shape, clusters>& team;

  Fiber& self() const { return *team.current; }
  Block& block() const { return team.blocks[self().block]; }
  void wait_as(decltype(Fiber::waits) what) const {
    self().waits = what;
    team.pause();
  }

  Place place() const { return {team.place.token, team.place.projection, self().block}; }
  int thread() const { return self().thread; }
  int warp() const { return self().thread / 32; }
  float from_lane_xor(float value, int distance) const {
    const int warp = self().thread / 32, lane = self().thread % 32;
    const int set = self().shuffles++ % 2;
    block().values[warp * 64 + set * 32 + lane] = value;
    ++block().shuffled[warp];
    wait_as(Fiber::kShuffle);
    return block().values[warp * 64 + set * 32 + (lane ^ distance)];
  }
  void sync() const {
    ++self().syncs;
    ++block().synced;
    wait_as(Fiber::kSync);
  }

  template <class T>
  T& shared(int offset) const {
    const int end = Shape::shared_bytes(team.a.choices, team.a.stages);
    if (offset < 0 || offset % static_cast<int>(alignof(T)) != 0 || offset + static_cast<int>(sizeof(T)) > end) {
      team.found(kWildShared);
      offset = (end + 15) & ~15;
    }
    return *reinterpret_cast<T*>(block().shared.data() + offset);
  }

  // Counts a read of memory that is not this block's own. False: it must not be read.
  bool may_read(const void* from, int bytes, int width) const {
    const char* at = static_cast<const char*>(from);
    for (const Region& region : team.regions) {
      if (at < region.base || at + bytes > region.base + region.bytes) continue;
      if (reinterpret_cast<uintptr_t>(at) % width != 0) break;
      if (region.reads != nullptr)
        for (int i = 0; i < bytes; ++i) ++region.reads[at - region.base + i];
      return true;
    }
    team.found(kWildRead);
    return false;
  }
  template <class T>
  T load(const void* from) const {
    T value{};
    if (may_read(from, sizeof value, sizeof value)) std::memcpy(&value, from, sizeof value);
    return value;
  }
  Words load16(const void* from) const { return load<Words>(from); }
  Words load16_once(const void* from) const { return load<Words>(from); }
  template <int width>
  Words load_x(const void* from) const {
    if (width == 8) return load16(from);
    const auto half = load<uint64_t>(from);
    return {{static_cast<uint32_t>(half), static_cast<uint32_t>(half >> 32), 0, 0}};
  }
  template <class T>
  void store(void* to, T value) const {
    std::memcpy(to, &value, sizeof value);
  }

  void execute(const Copy& copy) const {
    shared<Words>(copy.offset) = {};
    std::memcpy(&shared<Words>(copy.offset), copy.from, copy.bytes);
  }
  void copy(int offset, const void* from) const { copy_part(offset, from, 16); }
  void copy_part(int offset, const void* from, int bytes) const {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) team.found(kWildRead);
    if (!may_read(from, bytes, 1)) return;
    const Copy copy{offset, from, bytes};
    if (team.late) self().groups.back().push_back(copy);
    else execute(copy);
  }
  void commit() const { self().groups.emplace_back(); }
  void wait_for_copies(int younger) const {
    auto& groups = self().groups;
    const int count = static_cast<int>(groups.size()) - 1 - younger;
    for (int i = 0; i < count; ++i) {
      for (const Copy& copy : groups[i]) execute(copy);
      groups[i].clear();
    }
  }

  void team_begin() const {
    if (!clusters) return;
    if (self().thread == 0) block().barriers[0].there = block().barriers[1].there = true;
    ++team.arrived;
  }
  void team_wait() const { wait_as(Fiber::kTeam); }
  void expect(int set, int bytes) const {
    Barrier& barrier = block().barriers[set];
    barrier.bytes += bytes;
    --barrier.arrivals;
    barrier.check();
  }
  void send(int to, int offset, float value, int set) const {
    if (!team.blocks[to].barriers[set].there || team.arrived != static_cast<int>(team.fibers.size()))
      team.found(kNotReady);
    const Message message{to, offset, set, value};
    if (team.late) team.messages.push_back(message);
    else team.deliver(message);
  }
  void wait(int set, int parity) const {
    self().set = set;
    self().parity = parity;
    wait_as(Fiber::kBarrier);
  }
};

template <class Shape, bool clusters>
void enter(unsigned high, unsigned low) {
  auto* team = reinterpret_cast<Team<Shape, clusters>*>(static_cast<uintptr_t>(high) << 32 | low);
  Machine<Shape, clusters> machine{*team};
  multi_lora_block<Shape>(machine, team->a);
  team->current->ended = true;
  ++team->blocks[team->current->block].ended;
  team->pause();
}

template <class Shape, bool clusters>
Fault Team<Shape, clusters>::run() {
  for (std::size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    f.block = static_cast<int>(i / Shape::kThreads);
    f.thread = static_cast<int>(i % Shape::kThreads);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stack_of(i);
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&f.context, reinterpret_cast<void (*)()>(&enter<Shape, clusters>), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
  }
  std::vector<int> warps(fibers.size() / 32);
  for (std::size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
  int held = late ? static_cast<int>(random() % blocks.size()) : -1;  // begins when the others cannot go on
  for (std::size_t ended = 0; ended < fibers.size();) {
    bool moved = false;
    std::shuffle(warps.begin(), warps.end(), random);
    for (const int warp : warps)
      for (int lane = 0; lane < 32; ++lane) {
        Fiber& f = fibers[static_cast<std::size_t>(warp) * 32 + lane];
        if (f.ended || f.block == held || !ready(f)) continue;
        f.waits = Fiber::kRuns;
        resume(f);
        ended += f.ended;
        moved = true;
      }
    if (moved) continue;
    if (held >= 0) {
      held = -1;
      continue;
    }
    if (messages.empty()) return fault == kNone ? kDeadlock : fault;
    std::shuffle(messages.begin(), messages.end(), random);
    for (std::size_t some = 1 + random() % messages.size(); some > 0; --some) {
      deliver(messages.back());
      messages.pop_back();
    }
  }
  if (!messages.empty()) found(kLeft);
  for (Block& block : blocks)
    for (const Barrier& barrier : block.barriers)
      if (barrier.bytes != 0 || (clusters && barrier.there && barrier.arrivals != 1)) found(kLeft);
  return fault;
}

template <class Shape, bool clusters>
int run_all(const MultiLora& call, int team, const std::vector<Region>& regions, bool late, unsigned seed) {
  const MultiLoraArguments arguments = multi_lora_arguments<Shape>(call, team);
  for (int token = 0; token < call.tokens; ++token)
    for (int projection = 0; projection < call.projections; ++projection) {
      Team<Shape, clusters> one(arguments, team, {token, projection, 0}, regions, late, seed);
      if (const Fault fault = one.run()) return fault;
    }
  return kNone;
}

}  // namespace

// numbers: tokens, k, choices, rank, x type, a type, row stride of x, adapters, adapter stride, blocks of a team
// without clusters (0: clusters), whether copies and messages come late, seed. Of a projection: layer, n. Returns a
// Fault, or -1 where the kernel cannot be launched.
extern "C" int multi_lora(const int64_t* numbers, const void* x, const int64_t* ids, const float* mix,
                          const int64_t* table, int projections, void* const* ys, const int64_t* sizes, int regions,
                          const void* const* bases, const int64_t* bytes, int32_t* const* reads) {
  MultiLora call{numbers[0], static_cast<int>(numbers[1]), static_cast<int>(numbers[2]), projections,
                 static_cast<int>(numbers[3]), static_cast<int>(numbers[4]), static_cast<int>(numbers[5]), x,
                 numbers[6], ids, mix, table, numbers[7], numbers[8], {}};
  if (!multi_lora_fits(call)) return -1;
  for (int j = 0; j < projections; ++j)
    call.projection[j] = {ys[j], static_cast<int>(sizes[2 * j]), static_cast<int>(sizes[2 * j + 1])};
  std::vector<Region> memory;
  for (int i = 0; i < regions; ++i) memory.push_back({static_cast<const char*>(bases[i]), bytes[i], reads[i]});
  const int team = static_cast<int>(numbers[9]);
  const bool late = numbers[10] != 0;
  const auto seed = static_cast<unsigned>(numbers[11]);
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    return team == 0 ? run_all<Shape, true>(call, kTeam, memory, late, seed)
                     : run_all<Shape, false>(call, team, memory, late, seed);
  };
  // Not all: these take long enough to compile.
  const int bucket = call.rank <= 16 ? 16 : call.rank <= 32 ? 32 : 64;
  switch (100 * call.x_type + 1000 * call.a_type + bucket) {
    case 100 * kBFloat16 + 1000 * kFloat32 + 16: return run(MultiLoraShape<kBFloat16, kFloat32, 16>{});
    case 100 * kBFloat16 + 1000 * kFloat32 + 64: return run(MultiLoraShape<kBFloat16, kFloat32, 64>{});
    case 100 * kBFloat16 + 1000 * kBFloat16 + 16: return run(MultiLoraShape<kBFloat16, kBFloat16, 16>{});
    case 100 * kBFloat16 + 1000 * kBFloat16 + 32: return run(MultiLoraShape<kBFloat16, kBFloat16, 32>{});
    case 100 * kBFloat16 + 1000 * kBFloat16 + 64: return run(MultiLoraShape<kBFloat16, kBFloat16, 64>{});
    case 100 * kFloat16 + 1000 * kFloat16 + 16: return run(MultiLoraShape<kFloat16, kFloat16, 16>{});
    default: return -1;
  }
}
