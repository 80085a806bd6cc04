// SPDX-License-Identifier: Apache-2.0

#include "device_copy.h"

#include <algorithm>
#include <cstdlib>

#include "clock.h"

namespace llmdd {
namespace {

// What is on a stream at a time when there is a deadline to keep: some milliseconds of the slowest
// way, host memory over PCIe.
constexpr int64_t kPieceBytes = int64_t{64} << 20;

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

// Collects copies and hands them to the runtime.
class Submitter {
 public:
  Submitter(const AclRuntime& acl, const CopyLane& lane) : acl_(acl), lane_(lane) {}

  void submit(const TensorPairs& tensors, const Run* runs, size_t count) {
    const uint64_t* host_bases = lane_.kind == CopyKind::kHostToDevice   ? tensors.src_bases
                                 : lane_.kind == CopyKind::kDeviceToHost ? tensors.dst_bases
                                                                         : nullptr;
    const bool pageable = host_bases != nullptr && !page_locked(host_bases, tensors.count);
    batching_ = host_bases != nullptr && !pageable && acl_.memcpy_batch_async != nullptr;
    if (pageable) {
      // The runtime copies such memory by itself, at once or in the course of the call: what is on
      // the stream must be done before, and the copies be done before somebody reuses the memory.
      synchronize();
    }
    for (size_t t = 0; t < tensors.count; ++t) {
      for (size_t i = 0; i < count; ++i) {
        add(tensors.dst_bases[t] + static_cast<uint64_t>(runs[i].dst),
            tensors.src_bases[t] + static_cast<uint64_t>(runs[i].src), runs[i].nbytes);
      }
    }
    flush();
    if (pageable) {
      synchronize();
    }
  }

  void copy(uint64_t dst, uint64_t src, int64_t nbytes) {
    const size_t size = static_cast<size_t>(nbytes);
    acl_.check("aclrtMemcpyAsync", acl_.memcpy_async(pointer(dst), size, pointer(src), size,
                                                     static_cast<int>(lane_.kind), lane_.stream));
  }

  void synchronize() {
    acl_.check("aclrtSynchronizeStream", acl_.synchronize_stream(lane_.stream));
  }

 private:
  // Whether the device can reach all of this host memory by itself.
  bool page_locked(const uint64_t* bases, size_t count) const {
    return acl_.pointer_attributes != nullptr &&
           std::all_of(bases, bases + count, [this](uint64_t base) {
             PointerAttributes attributes;
             return acl_.pointer_attributes(pointer(base), &attributes) == 0 &&
                    attributes.location.place == MemoryPlace::kHost;
           });
  }

  void add(uint64_t dst, uint64_t src, int64_t nbytes) {
    if (!batching_) {
      copy(dst, src, nbytes);
      return;
    }
    dsts_.push_back(pointer(dst));
    srcs_.push_back(pointer(src));
    sizes_.push_back(static_cast<size_t>(nbytes));
    if (sizes_.size() == kMaxBatch) {
      flush();
    }
  }

  void flush() {
    if (sizes_.size() > 1 && batching_) {
      const int code = submit_batch();
      if (code == kAclNotSupported || code == kAclInvalidParam) {
        batching_ = false;  // this runtime or this memory; one by one tells, and changes no result
      } else {
        acl_.check("aclrtMemcpyBatchAsync", code);
        clear();
        return;
      }
    }
    for (size_t i = 0; i < sizes_.size(); ++i) {
      copy(reinterpret_cast<uint64_t>(dsts_[i]), reinterpret_cast<uint64_t>(srcs_[i]),
           static_cast<int64_t>(sizes_[i]));
    }
    clear();
  }

  int submit_batch() {
    int32_t device = 0;
    acl_.check("aclrtGetDevice", acl_.get_device(&device));
    const MemoryLocation on_device{static_cast<uint32_t>(device), MemoryPlace::kDevice};
    const bool to_device = lane_.kind == CopyKind::kHostToDevice;
    BatchAttributes attributes;
    (to_device ? attributes.dst : attributes.src) = on_device;
    size_t first_of = 0;
    size_t failed = 0;
    return acl_.memcpy_batch_async(dsts_.data(), sizes_.data(), srcs_.data(), sizes_.data(),
                                   sizes_.size(), &attributes, &first_of, 1, &failed, lane_.stream);
  }

  void clear() {
    dsts_.clear();
    srcs_.clear();
    sizes_.clear();
  }

  const AclRuntime& acl_;
  CopyLane lane_;
  bool batching_ = false;
  std::vector<void*> dsts_;
  std::vector<void*> srcs_;
  std::vector<size_t> sizes_;
};

// Calls `submit(submitter)`. If that fails, waits for what it had put on the stream already: the
// caller will take the error to mean that nobody touches the memory any more.
template <typename Submit>
void submit_or_settle(const CopyLane& lane, const Submit& submit) {
  const AclRuntime& acl = acl_runtime();
  try {
    Submitter submitter(acl, lane);
    submit(submitter);
  } catch (const AclError&) {
    (void)acl.synchronize_stream(lane.stream);  // the first error is the one to report
    throw;
  }
}

}  // namespace

std::vector<Run> without_self_overlap(const Run& run) {
  const int64_t distance = std::llabs(run.dst - run.src);
  std::vector<Run> pieces;
  if (distance == 0) {
    return pieces;  // copied onto itself
  }
  for (int64_t done = 0; done < run.nbytes; done += distance) {
    pieces.push_back({run.dst + done, run.src + done, std::min(distance, run.nbytes - done)});
  }
  if (run.dst > run.src) {
    std::reverse(pieces.begin(), pieces.end());
  }
  return pieces;
}

void submit_runs(const TensorPairs& tensors, const Run* runs, size_t count, const CopyLane& lane) {
  submit_or_settle(lane, [&](Submitter& submitter) { submitter.submit(tensors, runs, count); });
}

void submit_ordered(const uint64_t* bases, size_t num_tensors, const BlockOrder& order,
                    uint64_t staging, void* stream) {
  submit_or_settle({CopyKind::kDeviceToDevice, stream}, [&](Submitter& submitter) {
    for (size_t t = 0; t < num_tensors; ++t) {
      for (const OrderedStep& step : order.steps) {
        if (step.kind == OrderedStep::Kind::kSave) {
          submitter.copy(staging, bases[t] + static_cast<uint64_t>(step.run.src), step.run.nbytes);
        } else if (step.kind == OrderedStep::Kind::kRestore) {
          submitter.copy(bases[t] + static_cast<uint64_t>(step.run.dst), staging, step.run.nbytes);
        } else {
          for (const Run& piece : without_self_overlap(step.run)) {
            submitter.copy(bases[t] + static_cast<uint64_t>(piece.dst),
                           bases[t] + static_cast<uint64_t>(piece.src), piece.nbytes);
          }
        }
      }
    }
  });
}

void wait_for_stream(void* stream) {
  const AclRuntime& acl = acl_runtime();
  acl.check("aclrtSynchronizeStream", acl.synchronize_stream(stream));
}

int64_t copy_runs_on_lane(const TensorPairs& tensors, const Run* runs, size_t count,
                          const CopyLane& lane, int64_t deadline_ns) {
  (void)checked_total(runs, count);
  const WorkShares shares = share_runs(runs, count, kPieceBytes);
  int64_t copied = 0;
  // Small tensors share a piece: `together` of them, each with all its runs.
  int64_t bytes_of_one = 0;
  for (const Run& run : shares.runs) {
    bytes_of_one += run.nbytes;
  }
  const size_t together = static_cast<size_t>(
      std::clamp<int64_t>(kPieceBytes / std::max<int64_t>(bytes_of_one, 1), 1,
                          std::max<int64_t>(static_cast<int64_t>(tensors.count), 1)));
  for (size_t t = 0; t < tensors.count; t += together) {
    const TensorPairs some{tensors.dst_bases + t, tensors.src_bases + t,
                           std::min(together, tensors.count - t)};
    for (const RunSpan& span : shares.spans) {
      if (deadline_passed(deadline_ns)) {
        return copied;
      }
      submit_runs(some, shares.runs.data() + span.first, span.last - span.first, lane);
      wait_for_stream(lane.stream);
      for (size_t i = span.first; i < span.last; ++i) {
        copied += shares.runs[i].nbytes * static_cast<int64_t>(some.count);
      }
    }
  }
  return copied;
}

}  // namespace llmdd
