// SPDX-License-Identifier: Apache-2.0
// Python face of what transports need: mappings of another process's shareable regions, counters in
// them, process_vm_readv/writev, requests of engines, and the check of what a peer asks for.

#include <algorithm>
#include <cerrno>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "extents.h"
#include "host_region.h"
#include "mapped_copy.h"
#include "process_memory.h"
#include "tensor_args.h"
#include "words.h"

namespace llmdd {
namespace {

// What to move. ValueError for numbers that no list of runs has.
RemoteCopy checked_copy(const Int64Vector& local_bases, const Int64Vector& remote_bases,
                        const Int64Table& runs) {
  check_value(runs.columns() == 3, "runs must have 3 columns, not ", runs.columns());
  check_value(local_bases.size() == remote_bases.size(), "local_bases has ", local_bases.size(),
              " entries, remote_bases ", remote_bases.size());
  static_assert(sizeof(Run) == 3 * sizeof(int64_t), "a Run is a row of the table");
  const int64_t tensors = std::max<int64_t>(1, static_cast<int64_t>(local_bases.size()));
  const int64_t total =
      checked_total(reinterpret_cast<const Run*>(runs.data()), static_cast<size_t>(runs.rows()));
  check_value(total <= std::numeric_limits<int64_t>::max() / tensors,
              "runs times tensors exceed 2**63 bytes");
  return {local_bases.as_addresses(), remote_bases.as_addresses(), local_bases.size(), runs.data(),
          static_cast<size_t>(runs.rows())};
}

// A copy that takes a few microseconds keeps the GIL: another thread that takes it meanwhile may
// need longer than the copy.
constexpr int64_t kQuickBytes = 65536;
constexpr size_t kQuickRuns = 64;

Gil gil_for(const RemoteCopy& copy) {
  if (copy.num_runs > kQuickRuns) return Gil::kRelease;
  const auto tensors = static_cast<int64_t>(copy.num_tensors);
  const int64_t each = checked_total(reinterpret_cast<const Run*>(copy.runs), copy.num_runs);
  return each * tensors <= kQuickBytes ? Gil::kKeep : Gil::kRelease;  // checked_copy: it fits
}

pid_t checked_pid(int64_t pid) {
  check_value(pid > 0 && pid <= INT32_MAX, "pid=", pid, " is no process id");
  return static_cast<pid_t>(pid);
}

std::pair<uint64_t, int> move_process(Direction direction, const PeerProcess& process,
                                      const RemoteCopy& copy, int64_t deadline_ns,
                                      const VersionCheck& version) {
  if (!version.holds_before()) {
    return {0, ESTALE};
  }
  RemoteCopyResult result = copy_remote(process, direction, copy, deadline_ns);
  if (result.error == 0 && !version.holds_after()) {
    result.error = ESTALE;
  }
  return {result.bytes_done, result.error};
}

uint64_t* word_at(uint64_t address) {
  check_value(address != 0 && address % sizeof(uint64_t) == 0, "address ", address,
              " is not that of a 64-bit word");
  return reinterpret_cast<uint64_t*>(address);
}

uint64_t load_word_at(uint64_t address) { return load_word(word_at(address)); }
uint64_t bump_word_at(uint64_t address) { return bump_word(word_at(address)); }

// `counters` is the address of the two counters, mapped here; 0: nothing is checked.
VersionCheck version_check(uint64_t counters, bool leased, uint64_t lookup, uint64_t memory) {
  if (counters == 0) {
    return {};
  }
  return {word_at(counters), leased ? std::nullopt : std::optional(lookup), memory};
}

std::pair<uint64_t, int> read_process(int64_t pid, const Int64Vector& local_bases,
                                      const Int64Vector& remote_bases, const Int64Table& runs,
                                      int64_t deadline_ns, int32_t pidfd, int64_t start_time,
                                      uint64_t counters, bool leased, uint64_t lookup,
                                      uint64_t memory) {
  return move_process(Direction::kRead, {checked_pid(pid), pidfd, start_time},
                      checked_copy(local_bases, remote_bases, runs), deadline_ns,
                      version_check(counters, leased, lookup, memory));
}

std::pair<uint64_t, int> write_process(int64_t pid, const Int64Vector& local_bases,
                                       const Int64Vector& remote_bases, const Int64Table& runs,
                                       int64_t deadline_ns, int32_t pidfd, int64_t start_time) {
  return move_process(Direction::kWrite, {checked_pid(pid), pidfd, start_time},
                      checked_copy(local_bases, remote_bases, runs), deadline_ns, {});
}

int32_t move_mapped(bool write, const Int64Vector& local_bases, const Int64Vector& remote_bases,
                    const Int64Table& runs, uint64_t owner_base, uint64_t mapped_base,
                    uint64_t nbytes, int64_t deadline_ns, uint64_t counters, bool leased,
                    uint64_t lookup, uint64_t memory, const Threads& threads) {
  const RemoteCopy copy = checked_copy(local_bases, remote_bases, runs);
  const detail::WithoutGil free(gil_for(copy));
  const MoveState state = copy_mapped(
      write ? Direction::kWrite : Direction::kRead, copy, {owner_base, mapped_base, nbytes},
      version_check(counters, leased, lookup, memory), {threads.count, deadline_ns});
  return static_cast<int32_t>(state);
}

// Addresses wrap, as in memory.
int64_t offset_by(int64_t address, int64_t nbytes) {
  return static_cast<int64_t>(static_cast<uint64_t>(address) + static_cast<uint64_t>(nbytes));
}

// Where the next request of an engine begins: a run, and a byte of it.
using Cursor = std::pair<int64_t, int64_t>;

// One request at a time: a peer that asks for the same terabyte again and again must not make us
// write down all of it.
std::tuple<NewInt64, NewInt64, Cursor> engine_request(const Int64Table& runs, const Cursor& from,
                                                      int64_t max_bytes, int64_t max_runs) {
  check_value(runs.rows() == 3, "runs must have 3 rows, not ", runs.rows());
  check_value(max_bytes > 0 && max_runs > 0, "max_bytes=", max_bytes, " and max_runs=", max_runs,
              " must be positive");
  check_index(from.first >= 0 && from.second >= 0, "there is no run ", from.first);
  const int64_t count = runs.columns();
  const int64_t* local = runs.data();
  const int64_t* remote = local + count;
  const int64_t* nbytes = remote + count;
  NewInt64 here{{}, 3};
  NewInt64 there{{}, 3};
  auto [run, done] = from;
  int64_t pieces = 0;
  for (int64_t room = max_bytes; run < count && room > 0; done = 0, ++run) {
    check_value(nbytes[run] > 0 && done < nbytes[run], "run ", run, " has no byte ", done);
    if (pieces == max_runs) {
      break;
    }
    const int64_t size = std::min(nbytes[run] - done, room);
    here.values.insert(here.values.end(), {offset_by(local[run], done), size, 0});
    there.values.insert(there.values.end(), {offset_by(remote[run], done), size, 0});
    ++pieces;
    room -= size;
    if (done += size; done < nbytes[run]) {
      break;
    }
  }
  return {std::move(here), std::move(there), Cursor{run, done}};
}

// -1 unless all stretches lie inside rows of the tensors.
int64_t bytes_in_rows(const Int64Vector& starts, const Int64Vector& sizes, const Int64Vector& bases,
                      int64_t extent, int64_t row_stride_bytes, int64_t row_bytes) {
  check_value(starts.size() == sizes.size(), "starts has ", starts.size(), " entries, sizes ",
              sizes.size());
  check_value(extent >= 0 && row_bytes > 0 && row_stride_bytes >= row_bytes, "extent=", extent,
              ", row_stride_bytes=", row_stride_bytes, ", row_bytes=", row_bytes,
              " describe no tensor");
  std::vector<uint64_t> sorted(bases.as_addresses(), bases.as_addresses() + bases.size());
  std::sort(sorted.begin(), sorted.end());
  return bytes_inside(sorted, {extent, row_stride_bytes, row_bytes}, starts.as_addresses(),
                      sizes.data(), starts.size())
      .value_or(-1);
}

uint64_t mapping_address(const Held<PeerMapping>& mapping) {
  return reinterpret_cast<uint64_t>(mapping->data());
}
uint64_t mapping_nbytes(const Held<PeerMapping>& mapping) { return mapping->nbytes(); }
void mapping_close(const Held<PeerMapping>& mapping) { mapping->close(); }

}  // namespace

void bind_transfer(Module& module) {
  Class<PeerMapping>("PeerMapping", "A peer's shareable region, mapped into this process.")
      .static_method<&PeerMapping::open>(
          "open", {{"pid"}, {"fd"}, {"inode"}, {"device"}, {"nbytes"}, {"offset", 0}},
          "Maps it; OSError if the descriptor is not that region.")
      .property<&mapping_address>("address", "Where the region starts here; 0 once closed.")
      .property<&mapping_nbytes>("nbytes", "Bytes of the region.")
      .method<&mapping_close>("close", {},
                              "Unmaps; idempotent. No copy may be under way in the mapping.")
      .finish(module);

  const std::vector<Parameter> version = {
      {"counters", 0}, {"leased", 1}, {"lookup", 0}, {"memory", 0}};
  std::vector<Parameter> reading = {{"pid"},           {"local_bases"},    {"remote_bases"},
                                    {"runs"},          {"deadline_ns", 0}, {"pidfd", -1},
                                    {"start_time", -1}};
  const std::vector<Parameter> writing = reading;
  reading.insert(reading.end(), version.begin(), version.end());
  module.function<&read_process>(
      "read_process", reading,
      "(bytes_done, errno) of copying runs out of another process's memory. ESRCH: the process has "
      "ended; ESTALE: the counters are not what they must be.");
  module.function<&write_process>(
      "write_process", writing,
      "(bytes_done, errno) of copying runs into another process's memory. ESRCH: it has ended.");
  std::vector<Parameter> mapped = {{"write"},  {"local_bases"}, {"remote_bases"},
                                   {"runs"},   {"owner_base"},  {"mapped_base"},
                                   {"nbytes"}, {"deadline_ns"}};
  mapped.insert(mapped.end(), version.begin(), version.end());
  mapped.push_back({"threads", 0});
  module.function<&move_mapped>(
      "move_mapped", mapped,
      "Copies runs from or to a peer's region that is mapped here: 0 done, 1 late, 2 the counters "
      "are not what they must be, 3 a tensor leaves the region.",
      Gil::kKeep);
  module.function<&engine_request>(
      "engine_request", {{"runs"}, {"start"}, {"max_bytes"}, {"max_runs"}},
      "The tables (address, nbytes, 0), int64 [n, 3], of either side, for a request that begins at "
      "start=(run, byte); and where the next one begins.");
  module.function<&bytes_in_rows>(
      "bytes_inside",
      {{"starts"}, {"sizes"}, {"bases"}, {"extent"}, {"row_stride_bytes"}, {"row_bytes"}},
      "The bytes of all stretches, or -1 unless each has some and lies inside a row.");
  module.function<&load_word_at>("load_word", {{"address"}},
                                 "The counter at a mapped address, ordered after what was read "
                                 "before.",
                                 Gil::kKeep);
  module.function<&bump_word_at>("bump_word", {{"address"}},
                                 "Adds 1 to the counter at a mapped address, before anything that "
                                 "is written after.",
                                 Gil::kKeep);
}

}  // namespace llmdd
