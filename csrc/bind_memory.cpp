// SPDX-License-Identifier: Apache-2.0
// Python face of this process's cache memory: regions and arenas that turn into tensors, and
// questions about raw addresses.

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "address_probe.h"
#include "arena.h"
#include "bindings.h"
#include "host_region.h"
#include "move_flag.h"
#include "tensor_args.h"

namespace llmdd {
namespace {

// ---- MoveFlag

Held<MoveFlag> make_flag() { return std::make_shared<MoveFlag>(); }

void flag_arm(const Held<MoveFlag>& flag, uint64_t word) {
  check_value(word != 0 && word % sizeof(uint64_t) == 0, "word=", word,
              " is not the address of a 64-bit word");
  flag->arm(reinterpret_cast<uint64_t*>(word));
}

void flag_disarm(const Held<MoveFlag>& flag) { flag->disarm(); }

// ---- HostRegion

using Region = Held<HostRegion>;

uint64_t region_address(const Region& region) { return reinterpret_cast<uint64_t>(region->data()); }
uint64_t region_nbytes(const Region& region) { return region->nbytes(); }
int region_fd(const Region& region) { return region->fd(); }
uint64_t region_inode(const Region& region) { return region->inode(); }
uint64_t region_device(const Region& region) { return region->device(); }
uint64_t region_offset(const Region& region) { return region->offset(); }
std::string region_reason(const Region& region) { return region->reason(); }

std::vector<MemoryTensor> watched_tensors(const Region& region, const std::vector<int64_t>& offsets,
                                          const std::vector<int64_t>& shape,
                                          const ElementType& dtype, const Held<MoveFlag>& flag) {
  const uint64_t nbytes = bytes_of(shape, dtype);
  for (size_t i = 0; i < offsets.size(); ++i) {
    check_value(offsets[i] >= 0 && offsets[i] % dtype.nbytes == 0, "offsets[", i, "]=", offsets[i],
                " is not a non-negative multiple of the ", dtype.nbytes, " bytes of an element");
    check_value(nbytes <= region->nbytes() &&
                    static_cast<uint64_t>(offsets[i]) <= region->nbytes() - nbytes,
                "offsets[", i, "]=", offsets[i], " plus ", nbytes, " bytes ends beyond the ",
                region->nbytes(), " bytes of the region");
  }
  std::vector<MemoryTensor> tensors;
  tensors.reserve(offsets.size());
  for (const int64_t offset : offsets) {
    tensors.push_back({static_cast<char*>(region->data()) + offset, shape, dtype,
                       std::make_shared<WatchedMemory>(region, flag)});
  }
  return tensors;
}

std::vector<MemoryTensor> region_tensors(const Region& region, const std::vector<int64_t>& offsets,
                                         const std::vector<int64_t>& shape,
                                         const ElementType& dtype) {
  return watched_tensors(region, offsets, shape, dtype, nullptr);
}

// ---- Arena

// An arena and the memory that it cuts up.
struct ArenaMemory {
  ArenaMemory(std::shared_ptr<HeldBytes> held, unsigned page_shift)
      : memory(std::move(held)), arena(memory->nbytes(), page_shift) {}
  std::shared_ptr<HeldBytes> memory;
  Arena arena;
};

// One span in use, free again when this goes, in whatever thread, with or without the GIL.
struct Span {
  Span(std::shared_ptr<ArenaMemory> memory, uint64_t start, uint64_t size)
      : arena(std::move(memory)), offset(start), nbytes(size) {}
  ~Span() { arena->arena.release(offset); }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

  char* data() const { return arena->memory->data() + offset; }

  const std::shared_ptr<ArenaMemory> arena;
  const uint64_t offset;
  const uint64_t nbytes;
};

Held<ArenaMemory> make_arena(const std::shared_ptr<HeldBytes>& region_base, int64_t page_shift) {
  check_value(page_shift >= 10 && page_shift < 31, "page_shift=", page_shift,
              " is out of range [10, 31)");
  return std::make_shared<ArenaMemory>(region_base, static_cast<unsigned>(page_shift));
}

std::optional<std::vector<Held<Span>>> take_spans(const Held<ArenaMemory>& arena, int64_t count,
                                                  uint64_t nbytes) {
  check_value(count > 0, "count=", count, " is not positive");
  check_value(nbytes > 0, "nbytes=", nbytes, " is not positive");
  std::vector<uint64_t> offsets;
  if (!arena->arena.allocate(static_cast<size_t>(count), nbytes, &offsets)) return std::nullopt;
  std::vector<Held<Span>> spans;
  size_t owned = 0;  // by a Span that gives it back
  try {
    spans.reserve(offsets.size());
    for (; owned < offsets.size(); ++owned) {
      spans.push_back(std::make_shared<Span>(arena, offsets[owned], nbytes));
    }
  } catch (...) {
    for (; owned < offsets.size(); ++owned) arena->arena.release(offsets[owned]);
    throw;
  }
  return spans;
}

MemoryTensor span_tensor(const Held<Span>& span, const std::vector<int64_t>& shape,
                         const ElementType& dtype, const Held<MoveFlag>& flag) {
  const Held<ArenaMemory>& arena = span->arena;
  check_value(arena->memory->in_host_memory(), "the arena is not in host memory");
  check_value(bytes_of(shape, dtype) <= span->nbytes, "the span has ", span->nbytes,
              " bytes, the tensor needs ", bytes_of(shape, dtype));
  return {span->data(), shape, dtype, std::make_shared<WatchedMemory>(span, flag)};
}

uint64_t span_address(const Held<Span>& span) { return reinterpret_cast<uint64_t>(span->data()); }

std::tuple<uint64_t, uint64_t, uint64_t, uint64_t> arena_stats(const Held<ArenaMemory>& arena) {
  const ArenaStats stats = arena->arena.stats();
  return {stats.total_bytes, stats.free_bytes, stats.largest_free_bytes, stats.spans_in_use};
}

// ---- Raw addresses

MemoryTensor tensor_over(uint64_t address, const std::vector<int64_t>& shape,
                         const ElementType& dtype) {
  (void)bytes_of(shape, dtype);
  check_value(address != 0, "address=0 holds no tensor");
  check_value(address % static_cast<uint64_t>(dtype.nbytes) == 0, "address=", address,
              " is not a multiple of the ", dtype.nbytes, " bytes of an element");
  return {reinterpret_cast<void*>(address), shape, dtype, nullptr};
}

std::pair<int64_t, const char*> probe(const Int64Vector& addresses, int64_t nbytes) {
  check_value(nbytes > 0, "nbytes=", nbytes, " is not positive");
  const ProbeResult result =
      probe_extents(addresses.as_addresses(), addresses.size(), static_cast<uint64_t>(nbytes));
  return {result.index, result.reason};
}

int64_t mapped(const Int64Vector& addresses, int64_t nbytes) {
  check_value(nbytes > 0, "nbytes=", nbytes, " is not positive");
  return check_mapped(addresses.as_addresses(), addresses.size(), static_cast<uint64_t>(nbytes));
}

}  // namespace

void bind_memory(Module& module) {
  Class<MoveFlag>("MoveFlag",
                  "Adds 1 to a counter when a storage lets go of memory that it was made with.")
      .constructor<&make_flag>({})
      .method<&flag_arm>("arm", {{"word"}}, "The counter's address, mapped until disarm().",
                         Gil::kKeep)
      .method<&flag_disarm>("disarm", {}, "Nothing is counted any more.", Gil::kKeep)
      .finish(module);

  Class<HostRegion>("HostRegion",
                    "Zeroed host memory on a 2 MiB boundary, freed with its last reference.")
      .static_method<&HostRegion::create>("create", {{"nbytes"}, {"shareable", 1}},
                                          "Maps it; OSError where the kernel has no room.")
      .property<&region_address>("address", "Where it starts.")
      .property<&region_nbytes>("nbytes", "Its bytes, as asked for.")
      .property<&region_fd>("fd", "Descriptor that a peer can open; -1 = not shareable.")
      .property<&region_inode>("inode", "Inode of the descriptor.")
      .property<&region_device>("device", "st_dev of the descriptor.")
      .property<&region_offset>("offset", "Where it starts in that file.")
      .property<&region_reason>("reason", "Why it is not shareable; \"\" if it is.")
      .method<&region_tensors>("tensors", {{"offsets"}, {"shape"}, {"dtype"}},
                               "Tensors at byte offsets, each of which keeps the region alive.")
      .method<&watched_tensors>(
          "watched_tensors", {{"offsets"}, {"shape"}, {"dtype"}, {"flag"}},
          "The same; a storage raises the flag when it lets go of its memory.")
      .finish(module);

  Class<Span>("Span", "A stretch of an arena, free again with its last reference.")
      .property<&span_address>("address", "Where it starts.")
      .method<&span_tensor>("tensor", {{"shape"}, {"dtype"}, {"flag"}},
                            "A tensor at its start, which keeps it, and raises the flag when its "
                            "storage lets go of that.")
      .finish(module);

  Class<ArenaMemory>("Arena", "Page-granular best-fit allocator in one region.")
      .constructor<&make_arena>({{"region_base"}, {"page_shift"}})
      .method<&take_spans>("spans", {{"count"}, {"nbytes"}}, "So many spans; None = doesn't fit.")
      .method<&arena_stats>("stats", {}, "(total, free, largest free) bytes, and spans in use.",
                            Gil::kKeep)
      .finish(module);

  module.function<&tensor_over>("tensor_over", {{"address"}, {"shape"}, {"dtype"}},
                                "Tensor over host memory that it does not own.", Gil::kKeep);
  module.function<&probe>(
      "probe_extents", {{"addrs"}, {"nbytes"}},
      "(index, reason) of the first extent that isn't mapped, readable and writable; (-1, \"\").");
  module.function<&mapped>("check_mapped", {{"addrs"}, {"nbytes"}},
                           "Index of the first extent that isn't mapped; -1 = all are.");
}

}  // namespace llmdd
