// SPDX-License-Identifier: Apache-2.0
// Python face of copies by address that involve device memory. Streams are the integers that
// torch_npu gives for them.

#include <cstdint>

#include "acl_runtime.h"
#include "bindings.h"
#include "device_copy.h"
#include "tensor_args.h"

namespace llmdd {
namespace {

void use_device(int index) { acl_runtime().use_device(index); }

void enable_peer_access(int peer) {
  // An error may only say that it is enabled already; a copy that lacks it fails by itself.
  (void)acl_runtime().enable_peer_access(peer, 0);
}

void wait_for(uint64_t stream) { wait_for_stream(reinterpret_cast<void*>(stream)); }

int64_t copy_runs_on_stream(const Int64Vector& dst_bases, const Int64Vector& src_bases,
                            const Int64Table& runs, int kind, uint64_t stream,
                            int64_t deadline_ns) {
  check_value(runs.columns() == 3, "runs must have 3 columns, not ", runs.columns());
  check_value(dst_bases.size() == src_bases.size(), "dst_bases has ", dst_bases.size(),
              " addresses, but src_bases ", src_bases.size());
  check_value(kind >= 1 && kind <= 3, "kind=", kind, " is no kind of copy (1 to 3)");
  return copy_runs_on_lane(
      {dst_bases.as_addresses(), src_bases.as_addresses(), dst_bases.size()},
      reinterpret_cast<const Run*>(runs.data()), static_cast<size_t>(runs.rows()),
      {static_cast<CopyKind>(kind), reinterpret_cast<void*>(stream)}, deadline_ns);
}

}  // namespace

void bind_device(Module& module) {
  module.function<&use_device>("use_device", {{"index"}},
                               "Makes the NPU the one that the calling thread uses.");
  module.function<&enable_peer_access>("enable_peer_access", {{"peer"}},
                                       "Lets the thread's NPU reach memory of another one.");
  module.function<&wait_for>("wait_for_stream", {{"stream"}},
                             "Blocks until all that was put on the stream is done.");
  module.function<&copy_runs_on_stream>(
      "copy_runs_on_stream",
      {{"dst_bases"}, {"src_bases"}, {"runs"}, {"kind"}, {"stream"}, {"deadline_ns", 0}},
      "Bytes that the thread's NPU copied on the stream; done on return.");
}

}  // namespace llmdd
