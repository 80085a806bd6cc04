// SPDX-License-Identifier: Apache-2.0
// Python face of runs and of the copy engine. These deal in raw addresses, of which a torch op
// knows nothing.

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "copy_engine.h"
#include "op_checks.h"
#include "runs.h"
#include "tensor_args.h"

namespace llmdd {
namespace {

NewInt64 block_runs(const Int64Vector& dst_ids, const Int64Vector& src_ids,
                    int64_t dst_row_stride_bytes, int64_t src_row_stride_bytes, int64_t nbytes) {
  check_value(dst_ids.size() == src_ids.size(), "dst_ids has ", dst_ids.size(),
              " ids, but src_ids ", src_ids.size());
  const std::vector<Run> runs = merge_blocks(dst_ids.data(), src_ids.data(), dst_ids.size(),
                                             {dst_row_stride_bytes, src_row_stride_bytes, nbytes});
  static_assert(sizeof(Run) == 3 * sizeof(int64_t), "a Run is a row of the tensor");
  const int64_t* values = reinterpret_cast<const int64_t*>(runs.data());
  return {std::vector<int64_t>(values, values + 3 * runs.size()), 3};
}

// The rows of a [R, 3] tensor; std::invalid_argument unless it is one.
std::pair<const Run*, size_t> runs_of(const Int64Table& table) {
  check_value(table.columns() == 3, "runs has ", table.columns(),
              " columns, expected 3 (dst_offset, src_offset, nbytes)");
  return {reinterpret_cast<const Run*>(table.data()), static_cast<size_t>(table.rows())};
}

// (bytes, end of the last destination byte, end of the last source byte) of runs in one tensor
// pair.
std::tuple<int64_t, int64_t, int64_t> measure_runs(const Int64Table& runs) {
  const auto [first, count] = runs_of(runs);
  const int64_t total = checked_total(first, count);
  int64_t dst_end = 0;
  int64_t src_end = 0;
  for (size_t i = 0; i < count; ++i) {
    dst_end = std::max(dst_end, first[i].dst + first[i].nbytes);
    src_end = std::max(src_end, first[i].src + first[i].nbytes);
  }
  return {total, dst_end, src_end};
}

// Addresses in a region that starts at `from`, as addresses in its mapping at `to`; IndexError
// unless [address, address + extent) of each lies inside the region.
NewInt64 rebase(const Int64Vector& addrs, uint64_t from, uint64_t to, uint64_t nbytes,
                uint64_t extent) {
  NewInt64 moved;
  moved.values.reserve(addrs.size());
  for (size_t i = 0; i < addrs.size(); ++i) {
    const uint64_t offset = addrs.as_addresses()[i] - from;
    check_index(offset <= nbytes && extent <= nbytes - offset, "addrs[", i, "] plus ", extent,
                " bytes is not inside the region of ", nbytes, " bytes");
    moved.values.push_back(static_cast<int64_t>(to + offset));
  }
  return moved;
}

int64_t copy_runs_between(const Int64Vector& dst_bases, const Int64Vector& src_bases,
                          const Int64Table& runs, int64_t deadline_ns, Threads threads) {
  check_value(dst_bases.size() == src_bases.size(), "dst_bases has ", dst_bases.size(),
              " addresses, but src_bases ", src_bases.size());
  const auto [first, count] = runs_of(runs);
  const int64_t tensors = static_cast<int64_t>(dst_bases.size());
  check_value(tensors == 0 || checked_total(first, count) <= std::numeric_limits<int64_t>::max() /
                                                                 std::max<int64_t>(tensors, 1),
              "runs times tensors exceed 2**63 bytes");
  return copy_runs({dst_bases.as_addresses(), src_bases.as_addresses(), dst_bases.size()}, first,
                   count, {threads.count, deadline_ns});
}

// What the ops check of their ids, for callers that move bytes without an op.
void check_ids(const std::string& name, const Int64Vector& ids, int64_t rows, bool unique) {
  const Ids list = ids.values();
  check_range(name.c_str(), list, rows);
  if (unique) {
    (void)table_of_destinations(name.c_str(), list);
  }
}

}  // namespace

void bind_copy(Module& module) {
  module.function<&block_runs>(
      "block_runs",
      {{"dst_ids"}, {"src_ids"}, {"dst_row_stride_bytes"}, {"src_row_stride_bytes"}, {"nbytes"}},
      "The runs, int64 [R, 3], that copy block src_ids[i] to block dst_ids[i].");
  module.function<&measure_runs>("measure_runs", {{"runs"}},
                                 "Bytes of the runs, and where they end in dst and in src.",
                                 Gil::kKeep);
  module.function<&rebase>("rebase",
                           {{"addrs"}, {"from_base"}, {"to_base"}, {"nbytes"}, {"extent"}},
                           "Addresses in a region, as addresses in its mapping.", Gil::kKeep);
  module.function<&check_ids>("check_ids", {{"name"}, {"ids"}, {"rows"}, {"unique", 0}},
                              "Refuses ids out of range and, if they must be, repeated ones.",
                              Gil::kKeep);
  module.function<&copy_runs_between>(
      "copy_runs", {{"dst_bases"}, {"src_bases"}, {"runs"}, {"deadline_ns", 0}, {"threads", 0}},
      "Bytes copied between addresses; fewer than all if the deadline has passed.");
}

}  // namespace llmdd
