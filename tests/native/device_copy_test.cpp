// SPDX-License-Identifier: Apache-2.0
// Copies on a device against slow models, on a runtime that is made for it. Argument: the library
// that plays the runtime; none to see what happens without one.

#include "device_copy.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

using namespace llmdd;

namespace {

#define EXPECT(condition)                                                   \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                         \
    }                                                                       \
  } while (false)

struct Fake {
  void* library;

  template <typename Result = void, typename... Arguments>
  Result call(const char* name, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(dlsym(library, name))(arguments...);
  }
  size_t count(const char* name) const { return call<size_t>(name); }
};

using Bytes = std::vector<uint8_t>;

Bytes noise(size_t nbytes, std::mt19937& random) {
  Bytes bytes(nbytes);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

std::vector<uint64_t> bases_of(std::vector<Bytes>& tensors) {
  std::vector<uint64_t> bases;
  for (Bytes& tensor : tensors) bases.push_back(reinterpret_cast<uint64_t>(tensor.data()));
  return bases;
}

constexpr int64_t kBlock = 24;

struct Scene {
  std::vector<Bytes> dst, src;
  std::vector<uint64_t> dst_bases, src_bases;
  std::vector<Run> runs;
  std::vector<Bytes> expected;

  Scene(size_t tensors, int64_t blocks, std::mt19937& random) {
    std::vector<int64_t> from(static_cast<size_t>(blocks)), to(static_cast<size_t>(blocks));
    for (int64_t i = 0; i < blocks; ++i) from[i] = to[i] = i;
    std::shuffle(from.begin(), from.end(), random);
    std::shuffle(to.begin(), to.end(), random);
    runs = merge_blocks(to.data(), from.data(), to.size(), {kBlock + 4, kBlock, kBlock});
    for (size_t t = 0; t < tensors; ++t) {
      dst.push_back(noise(static_cast<size_t>(blocks * (kBlock + 4)), random));
      src.push_back(noise(static_cast<size_t>(blocks * kBlock), random));
      expected.push_back(dst.back());
      for (const Run& run : runs) {
        std::memcpy(&expected.back()[run.dst], &src.back()[run.src], run.nbytes);
      }
    }
    dst_bases = bases_of(dst);
    src_bases = bases_of(src);
  }
  TensorPairs pairs() const { return {dst_bases.data(), src_bases.data(), dst_bases.size()}; }
};

void test_runs(const Fake& fake, CopyKind kind, bool locked, bool batches) {
  std::mt19937 random(static_cast<unsigned>(kind) * 2 + locked);
  fake.call("fake_reset");
  Scene scene(3, 3000, random);
  const auto& host = kind == CopyKind::kHostToDevice ? scene.src : scene.dst;
  for (const Bytes& tensor : host) {
    if (locked) fake.call("fake_lock", static_cast<const void*>(tensor.data()));
  }
  submit_runs(scene.pairs(), scene.runs.data(), scene.runs.size(), {kind, nullptr});
  const bool host_side = kind != CopyKind::kDeviceToDevice;
  // Memory that isn't page-locked is done with on return; the rest is left on the stream.
  EXPECT((fake.count("fake_pending") == 0) == (host_side && !locked));
  wait_for_stream(nullptr);
  EXPECT(scene.dst == scene.expected);
  const bool batched = batches && host_side && locked;
  EXPECT((fake.count("fake_batches") > 1) == batched);
  EXPECT((fake.count("fake_singles") == 0) == batched);
  EXPECT(fake.count("fake_largest_batch") == (batched ? kMaxBatch : 0));
}

void test_refused_batch(const Fake& fake) {
  std::mt19937 random(7);
  fake.call("fake_reset");
  Scene scene(2, 50, random);
  for (const Bytes& tensor : scene.src) {
    fake.call("fake_lock", static_cast<const void*>(tensor.data()));
  }
  fake.call("fake_fail", 1, kAclNotSupported);
  submit_runs(scene.pairs(), scene.runs.data(), scene.runs.size(),
              {CopyKind::kHostToDevice, nullptr});
  wait_for_stream(nullptr);
  EXPECT(scene.dst == scene.expected);
  EXPECT(fake.count("fake_batches") == 0);
}

void test_error(const Fake& fake) {
  std::mt19937 random(8);
  fake.call("fake_reset");
  Scene scene(2, 50, random);
  fake.call("fake_fail", 20, 507899);
  try {
    submit_runs(scene.pairs(), scene.runs.data(), scene.runs.size(),
                {CopyKind::kDeviceToDevice, nullptr});
    EXPECT(false);
  } catch (const AclError& error) {
    EXPECT(error.code() == 507899);
    EXPECT(error.call() == "aclrtMemcpyAsync");
    EXPECT(std::string(error.what()).find("was told to fail") != std::string::npos);
  }
  EXPECT(fake.count("fake_singles") == 19);
  EXPECT(fake.count("fake_pending") == 0);
}

void test_deadline(const Fake& fake) {
  std::mt19937 random(9);
  fake.call("fake_reset");
  Scene scene(2, 50, random);
  const Scene before = scene;
  const CopyLane lane{CopyKind::kDeviceToDevice, nullptr};
  EXPECT(copy_runs_on_lane(scene.pairs(), scene.runs.data(), scene.runs.size(), lane, 1) == 0);
  EXPECT(scene.dst == before.dst);
  EXPECT(copy_runs_on_lane(scene.pairs(), scene.runs.data(), scene.runs.size(), lane, 0) ==
         2 * 50 * kBlock);
  EXPECT(scene.dst == scene.expected);
  EXPECT(fake.count("fake_pending") == 0);
}

// Chains, fans and rings; whatever a block is read for comes before it is written.
void test_order(const Fake& fake, unsigned seed) {
  std::mt19937 random(seed);
  fake.call("fake_reset");
  const int64_t blocks = 2 + random() % 60;
  std::vector<int64_t> dst;
  for (int64_t i = 0; i < blocks; ++i) dst.push_back(i);
  std::shuffle(dst.begin(), dst.end(), random);
  dst.resize(1 + random() % blocks);
  std::vector<int64_t> src(dst);
  if (seed % 3 == 0) {
    std::shuffle(src.begin(), src.end(), random);
  } else if (seed % 3 == 1) {  // all one down, or up: merged, it overlaps itself
    std::sort(dst.begin(), dst.end());
    for (size_t i = 0; i < dst.size(); ++i) {
      src[i] = std::clamp<int64_t>(dst[i] + (seed % 2 == 0 ? 1 : -1), 0, blocks - 1);
    }
  } else {
    for (int64_t& id : src) id = static_cast<int64_t>(random() % blocks);
  }
  IdTable table(dst.size());
  for (size_t i = 0; i < dst.size(); ++i) table.insert(dst[i], static_cast<int64_t>(i));
  const BlockOrder order = order_blocks(dst.data(), src.data(), dst.size(), table, kBlock, kBlock);
  std::vector<Bytes> tensors{noise(blocks * kBlock, random), noise(blocks * kBlock, random)};
  std::vector<Bytes> expected(tensors);
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (size_t i = 0; i < dst.size(); ++i) {
      std::memcpy(&expected[t][dst[i] * kBlock], &tensors[t][src[i] * kBlock], kBlock);
    }
  }
  Bytes staging(static_cast<size_t>(order.staging_bytes));
  submit_ordered(bases_of(tensors).data(), tensors.size(), order,
                 reinterpret_cast<uint64_t>(staging.data()), nullptr);
  wait_for_stream(nullptr);
  EXPECT(tensors == expected);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    try {
      wait_for_stream(nullptr);
      return 1;
    } catch (const AclMissing& error) {
      std::printf("%s\n", error.what());
      return 0;
    }
  }
  const Fake fake{dlopen(argv[1], RTLD_NOW)};
  EXPECT(fake.library != nullptr);
  const bool batches = dlsym(fake.library, "aclrtMemcpyBatchAsync") != nullptr;
  for (CopyKind kind :
       {CopyKind::kHostToDevice, CopyKind::kDeviceToHost, CopyKind::kDeviceToDevice}) {
    for (bool locked : {false, true}) test_runs(fake, kind, locked, batches);
  }
  if (batches) test_refused_batch(fake);
  test_error(fake);
  test_deadline(fake);
  for (unsigned seed = 0; seed < 300; ++seed) test_order(fake, seed);
  std::printf("ok\n");
  return 0;
}
