#include "device.h"

#include <algorithm>

namespace strobe {
alignas(1024) unsigned char smem[emulator::kSharedBytes];
}

namespace emulator {

Block* block = nullptr;

namespace {
constexpr size_t kStackBytes = 256 * 1024;
// Rounds in which no thread goes on and no copy lands: they all wait for each other.
constexpr int kStuckRounds = 50;
// A block of a cluster may start later than the other, or stand still, for so many rounds.
constexpr unsigned kLongAway = 500;
}  // namespace

void Block::enter() {
  block->kernel_();
  block->fiber().finished = true;
  block->moved = true;
  for (;;) block->yield();
}

unsigned char* Block::memory() { return block == this ? strobe::smem : saved_.data(); }

void Block::resume() {
  if (block == this) return;
  if (block && cluster.blocks.size() > 1) {
    block->saved_.assign(strobe::smem, strobe::smem + kSharedBytes);
    std::memcpy(strobe::smem, saved_.data(), kSharedBytes);
  }
  block = this;
}

void Block::start(unsigned threads, unsigned number, unsigned count, const std::function<void()>& kernel) {
  kernel_ = kernel;
  index = number, grid = count, left = threads;
  fibers.clear(), barriers.clear(), named.clear(), copies.clear();
  warps.assign(threads / kWarp, Warp{});
  saved_.assign(kSharedBytes, 0xff);
  away = 0;
  for (unsigned i = 0; i < threads; ++i) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& f = *fibers.back();
    f.thread = i;
    f.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Block::enter, 0);
  }
}

// Warps take turns in random order, for random numbers of rounds: one may run far ahead of another.
void Block::round() {
  resume();
  moved = false;
  const unsigned rounds = 1 + random() % 8, first = random() % unsigned(warps.size());
  for (unsigned w = 0; w < warps.size(); ++w) {
    const unsigned warp = (first + w) % unsigned(warps.size());
    for (unsigned r = 0; r < rounds; ++r) {
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        current = warp * kWarp + lane;
        if (fiber().finished) continue;
        swapcontext(&scheduler, &fiber().context);
        if (fiber().finished) --left;
      }
    }
  }
  land();
}

void Block::land() {
  resume();
  while (!copies.empty() && (!moved || chance(2))) {
    const size_t which = random() % copies.size();
    const auto copy = copies[which];
    copies.erase(copies.begin() + long(which));
    copy();
    moved = true;
  }
}

Cluster::Cluster(unsigned size, unsigned seed) {
  for (unsigned i = 0; i < size; ++i) blocks.push_back(std::make_unique<Block>(*this, seed + i));
}

bool Cluster::run(unsigned threads, unsigned index, unsigned grid, const std::function<void()>& kernel) {
  arrived = 0;
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i]->start(threads, index + i, grid, kernel);
  if (blocks.size() > 1) {
    auto& random = blocks[0]->random;
    blocks[random() % blocks.size()]->away = random() % kLongAway;
  }
  block = nullptr;
  std::memset(strobe::smem, 0xff, sizeof strobe::smem);
  const auto all_ended = [&] {
    return std::all_of(blocks.begin(), blocks.end(), [](const auto& b) { return b->ended(); });
  };
  for (int stuck = 0; !all_ended();) {
    bool moved = false;
    for (const auto& b : blocks) {
      if (b->away > 0) {
        --b->away;
        b->land();  // the other block's copies come nevertheless
        continue;
      }
      b->round();
      moved |= b->moved;
      if (blocks.size() > 1 && b->chance(100)) b->away = b->random() % kLongAway;
    }
    if (!moved)  // they wait for who is away
      for (const auto& b : blocks) b->away = 0;
    stuck = moved ? 0 : stuck + 1;
    if (stuck > kStuckRounds) return false;
  }
  return std::all_of(blocks.begin(), blocks.end(), [](const auto& b) { return b->copies.empty(); });
}

uint64_t (&Block::exchange(uint64_t value)) [kWarp] {
  Fiber& f = fiber();
  Warp& warp = warps[f.thread / kWarp];
  const unsigned round = warp.round;
  warp.value[round % 2][f.thread % kWarp] = value;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.round;
    moved = true;
  } else {
    while (warp.round == round) yield();
  }
  return warp.value[round % 2];
}

void named_barrier(unsigned id, unsigned threads, bool waits) {
  NamedBarrier& barrier = block->named[id];
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    block->moved = true;
  }
  if (waits) block->wait([&] { return barrier.generation != generation; });
}

}  // namespace emulator
