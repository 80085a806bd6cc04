// SPDX-License-Identifier: Apache-2.0

#include "copy_engine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>

#include "clock.h"
#include "stream_copy.h"

namespace llmdd {
namespace {

// What one thread takes at a time: long enough to hide the taking, short enough to meet a deadline
// within 0.1 ms.
constexpr int64_t kShareBytes = int64_t{1} << 20;
// Starting and joining a thread costs some 30 us, in which one thread moves about 0.3 MiB; each
// must bring several times that. Threads are made per call, because a pool would outlive fork()
// only in name and would need an owner.
constexpr int64_t kBytesPerThread = int64_t{4} << 20;
// From here on the copied bytes push themselves out of the caches, and streaming stores win
// (measured at 16 MiB of 4 KiB blocks: 1.9 ms against 6.1 ms). Below, ordinary stores are as fast,
// and leave the destination in cache for whoever reads it next.
constexpr int64_t kStreamFromBytes = int64_t{16} << 20;

uint8_t* at(uint64_t base, int64_t offset) {
  return reinterpret_cast<uint8_t*>(base + static_cast<uint64_t>(offset));
}

bool overlap(const uint8_t* dst, const uint8_t* src, size_t nbytes) {
  const uintptr_t d = reinterpret_cast<uintptr_t>(dst);
  const uintptr_t s = reinterpret_cast<uintptr_t>(src);
  return d - s < nbytes || s - d < nbytes;
}

void copy_bytes(uint8_t* dst, const uint8_t* src, size_t nbytes, bool stream,
                const uint8_t* next_src) {
  if (overlap(dst, src, nbytes)) {
    std::memmove(dst, src, nbytes);
  } else if (stream) {
    stream_copy(dst, src, nbytes, next_src);
  } else {
    std::memcpy(dst, src, nbytes);
  }
}

int threads_for(int64_t total, int max_threads) {
  return static_cast<int>(
      std::clamp<int64_t>(total / kBytesPerThread, 1, std::max(max_threads, 1)));
}

// Calls `work()` in `threads` threads, the caller's among them, and returns when all are done.
// Where the system refuses a thread the others do its share: `work` takes what is left until
// nothing is.
template <typename Work>
void in_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  try {
    while (static_cast<int>(others.size()) + 1 < threads) {
      others.emplace_back(work);
    }
  } catch (const std::system_error&) {
    // Fewer threads only mean less speed.
  }
  work();
  for (std::thread& other : others) {
    other.join();
  }
}

}  // namespace

int64_t copy_runs(const TensorPairs& tensors, const Run* runs, size_t count,
                  const CopyLimits& limits) {
  const int64_t total = checked_total(runs, count) * static_cast<int64_t>(tensors.count);
  const WorkShares shares = share_runs(runs, count, kShareBytes);
  const bool stream = total >= kStreamFromBytes;
  const size_t items = shares.spans.size() * tensors.count;
  std::atomic<size_t> next_item{0};
  std::atomic<int64_t> copied{0};

  in_threads(threads_for(total, limits.max_threads), [&] {
    int64_t mine = 0;
    while (!deadline_passed(limits.deadline_ns)) {
      const size_t item = next_item.fetch_add(1, std::memory_order_relaxed);
      if (item >= items) {
        break;
      }
      const size_t tensor = item / shares.spans.size();
      const RunSpan& span = shares.spans[item % shares.spans.size()];
      const uint64_t dst_base = tensors.dst_bases[tensor];
      const uint64_t src_base = tensors.src_bases[tensor];
      for (size_t i = span.first; i < span.last; ++i) {
        const Run& run = shares.runs[i];
        const uint8_t* next_src =
            i + 1 < span.last ? at(src_base, shares.runs[i + 1].src) : nullptr;
        copy_bytes(at(dst_base, run.dst), at(src_base, run.src), static_cast<size_t>(run.nbytes),
                   stream, next_src);
        mine += run.nbytes;
      }
    }
    stream_fence();
    copied.fetch_add(mine, std::memory_order_relaxed);
  });
  return copied.load(std::memory_order_relaxed);
}

void copy_ordered(const uint64_t* bases, size_t num_tensors, const BlockOrder& order,
                  int max_threads) {
  int64_t total = 0;
  for (const OrderedStep& step : order.steps) {
    total += step.run.nbytes;
  }
  total *= static_cast<int64_t>(num_tensors);
  const bool stream = total >= kStreamFromBytes;
  const int threads =
      static_cast<int>(std::min<int64_t>(threads_for(total, max_threads), num_tensors));
  // All staging is allocated before the first byte moves, so that running out of memory changes
  // nothing.
  const size_t staging_bytes = static_cast<size_t>(order.staging_bytes);
  const std::unique_ptr<uint8_t[]> staging(
      new uint8_t[staging_bytes * static_cast<size_t>(threads)]);
  std::atomic<size_t> next_thread{0};
  std::atomic<size_t> next_tensor{0};

  in_threads(threads, [&] {
    uint8_t* saved =
        staging.get() + staging_bytes * next_thread.fetch_add(1, std::memory_order_relaxed);
    for (size_t t; (t = next_tensor.fetch_add(1, std::memory_order_relaxed)) < num_tensors;) {
      for (const OrderedStep& step : order.steps) {
        const size_t nbytes = static_cast<size_t>(step.run.nbytes);
        uint8_t* dst = step.kind == OrderedStep::Kind::kSave ? saved : at(bases[t], step.run.dst);
        const uint8_t* src =
            step.kind == OrderedStep::Kind::kRestore ? saved : at(bases[t], step.run.src);
        copy_bytes(dst, src, nbytes, stream && step.kind == OrderedStep::Kind::kCopy, nullptr);
      }
    }
    stream_fence();
  });
}

}  // namespace llmdd
