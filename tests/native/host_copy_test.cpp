// SPDX-License-Identifier: Apache-2.0
// Copies in host memory and an arena, used by several threads at once: for ThreadSanitizer.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "arena.h"
#include "block_order.h"
#include "copy_engine.h"

using namespace llmdd;

namespace {

constexpr int64_t kBlocks = 64;
constexpr int64_t kBlockBytes = 96 << 10;  // several megabytes in all, so that helpers start
constexpr int kRounds = 6;
constexpr int kCallers = 3;
constexpr int kHelpers = 4;

std::atomic<bool> failed{false};

void expect(bool condition, const char* what) {
  if (!condition && !failed.exchange(true)) {
    std::printf("not true: %s\n", what);
  }
}

using Bytes = std::vector<uint8_t>;

uint64_t address_of(Bytes& bytes) { return reinterpret_cast<uint64_t>(bytes.data()); }

std::vector<int64_t> shuffled(std::mt19937& random) {
  std::vector<int64_t> ids(kBlocks);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), random);
  return ids;
}

Bytes painted() {
  Bytes bytes(kBlocks * kBlockBytes);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i / kBlockBytes + 1);
  return bytes;
}

// Block ids[i] of `dst` must hold what block i was painted with.
bool is_painted(const Bytes& dst, const std::vector<int64_t>& ids) {
  for (int64_t i = 0; i < kBlocks; ++i) {
    const uint8_t* block = dst.data() + ids[i] * kBlockBytes;
    if (block[0] != i + 1 || block[kBlockBytes - 1] != i + 1) return false;
  }
  return true;
}

void copy_between(std::mt19937& random) {
  Bytes src = painted();
  Bytes first(src.size()), second(src.size());
  const std::vector<int64_t> to = shuffled(random);
  std::vector<int64_t> from(kBlocks);
  std::iota(from.begin(), from.end(), 0);
  const std::vector<Run> runs =
      merge_blocks(to.data(), from.data(), kBlocks, {kBlockBytes, kBlockBytes, kBlockBytes});
  const uint64_t dst_bases[] = {address_of(first), address_of(second)};
  const uint64_t src_bases[] = {address_of(src), address_of(src)};
  CopyLimits limits;
  limits.max_threads = kHelpers;
  const int64_t done = copy_runs({dst_bases, src_bases, 2}, runs.data(), runs.size(), limits);
  expect(done == 2 * kBlocks * kBlockBytes, "all bytes were copied");
  expect(is_painted(first, to) && is_painted(second, to), "every block is where it belongs");
}

void permute(std::mt19937& random) {
  Bytes first = painted(), second = painted();
  const std::vector<int64_t> to = shuffled(random);
  std::vector<int64_t> from(kBlocks);
  std::iota(from.begin(), from.end(), 0);
  IdTable table(kBlocks);
  for (int64_t i = 0; i < kBlocks; ++i) table.insert(to[i], i);
  const BlockOrder order =
      order_blocks(to.data(), from.data(), kBlocks, table, kBlockBytes, kBlockBytes);
  const uint64_t bases[] = {address_of(first), address_of(second)};
  copy_ordered(bases, 2, order, kHelpers);
  expect(is_painted(first, to) && is_painted(second, to), "a permutation is a snapshot");
}

void use(Arena& arena, std::mt19937& random) {
  std::vector<uint64_t> held;
  for (int i = 0; i < 200; ++i) {
    std::vector<uint64_t> offsets;
    if (random() % 2 && arena.allocate(1 + random() % 3, 1 + random() % 9000, &offsets)) {
      held.insert(held.end(), offsets.begin(), offsets.end());
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      expect(arena.release(held.back()), "what was allocated can be released");
      held.pop_back();
    }
  }
  for (uint64_t offset : held) expect(arena.release(offset), "what was allocated can be released");
}

}  // namespace

int main() {
  Arena arena(1 << 20, 12);
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < kCallers; ++seed) {
    callers.emplace_back([&arena, seed] {
      std::mt19937 random(seed);
      for (int round = 0; round < kRounds; ++round) {
        copy_between(random);
        permute(random);
        use(arena, random);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  expect(arena.stats().spans_in_use == 0, "nothing is left in use");
  if (!failed) std::printf("ok\n");
  return failed ? 1 : 0;
}
