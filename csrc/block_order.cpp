// SPDX-License-Identifier: Apache-2.0

#include "block_order.h"

#include <utility>

namespace llmdd {

IdTable::IdTable(size_t count) : shift_(63) {
  size_t size = 2;
  while (size < 2 * count) {
    size *= 2;
    --shift_;
  }
  slots_.assign(size, {0, kNone});
}

size_t IdTable::slot_of(int64_t id) const {
  // Fibonacci hashing: neighbours in id land far apart.
  size_t slot = static_cast<size_t>((static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15ULL) >> shift_);
  while (slots_[slot].position != kNone && slots_[slot].id != id) {
    slot = (slot + 1) & (slots_.size() - 1);
  }
  return slot;
}

int64_t IdTable::insert(int64_t id, int64_t position) {
  Slot& slot = slots_[slot_of(id)];
  if (slot.position != kNone) {
    return slot.position;
  }
  slot = {id, position};
  return kNone;
}

int64_t IdTable::find(int64_t id) const { return slots_[slot_of(id)].position; }

namespace {

// Pairs as a graph: each pair points to the one that writes the block it reads. Destinations are
// distinct, so there is at most one such pair, and what is left after all readers-first steps are
// plain rings.
class Orderer {
 public:
  Orderer(const int64_t* dst_ids, const int64_t* src_ids, size_t count, const IdTable& dst_table,
          int64_t row_stride_bytes, int64_t nbytes)
      : dst_ids_(dst_ids),
        src_ids_(src_ids),
        row_stride_bytes_(row_stride_bytes),
        nbytes_(nbytes),
        writer_(count),
        readers_(count, 0) {
    for (size_t i = 0; i < count; ++i) {
      const bool to_itself = dst_ids[i] == src_ids[i];
      writer_[i] = to_itself ? IdTable::kNone : dst_table.find(src_ids[i]);
      if (writer_[i] != IdTable::kNone && writes_itself(writer_[i])) {
        writer_[i] = IdTable::kNone;  // copied onto itself: never changes
      }
      if (writer_[i] != IdTable::kNone) {
        ++readers_[writer_[i]];
      }
    }
  }

  BlockOrder order() {
    const size_t count = writer_.size();
    std::vector<bool> done(count, false);
    for (size_t i = 0; i < count; ++i) {
      done[i] = writes_itself(i);
    }
    for (size_t i = 0; i < count; ++i) {
      // Follow the chain from each pair that nobody waits for.
      for (int64_t at = static_cast<int64_t>(i);
           at != IdTable::kNone && !done[at] && readers_[at] == 0;) {
        copy(at);
        done[at] = true;
        at = writer_[at];
        if (at != IdTable::kNone) {
          --readers_[at];
        }
      }
    }
    for (size_t i = 0; i < count; ++i) {
      if (!done[i]) {
        cut_ring(static_cast<int64_t>(i), done);
      }
    }
    return std::move(order_);
  }

 private:
  bool writes_itself(size_t i) const { return dst_ids_[i] == src_ids_[i]; }

  void copy(int64_t at) {
    const Run run{dst_ids_[at] * row_stride_bytes_, src_ids_[at] * row_stride_bytes_, nbytes_};
    std::vector<OrderedStep>& steps = order_.steps;
    if (!steps.empty() && steps.back().kind == OrderedStep::Kind::kCopy &&
        extend(steps.back().run, run)) {
      return;  // one step, which may then overlap itself; memmove keeps the meaning
    }
    steps.push_back({OrderedStep::Kind::kCopy, run});
  }

  // The pair at `first` overwrites what the ring's last pair reads: save that, go round, restore.
  void cut_ring(int64_t first, std::vector<bool>& done) {
    order_.staging_bytes = nbytes_;
    order_.steps.push_back(
        {OrderedStep::Kind::kSave, {0, dst_ids_[first] * row_stride_bytes_, nbytes_}});
    int64_t at = first;
    while (writer_[at] != first) {
      copy(at);
      done[at] = true;
      at = writer_[at];
    }
    done[at] = true;
    order_.steps.push_back(
        {OrderedStep::Kind::kRestore, {dst_ids_[at] * row_stride_bytes_, 0, nbytes_}});
  }

  const int64_t* dst_ids_;
  const int64_t* src_ids_;
  int64_t row_stride_bytes_;
  int64_t nbytes_;
  std::vector<int64_t> writer_;  // by pair: the pair that writes the block this one reads, or kNone
  std::vector<int64_t>
      readers_;  // by pair: pairs yet to be copied that read the block this one writes
  BlockOrder order_;
};

}  // namespace

bool pairs_interfere(const int64_t* dst_ids, const int64_t* src_ids, size_t count,
                     const IdTable& dst_table) {
  for (size_t i = 0; i < count; ++i) {
    if (dst_ids[i] == src_ids[i]) {
      continue;
    }
    const int64_t writer = dst_table.find(src_ids[i]);
    if (writer != IdTable::kNone && dst_ids[writer] != src_ids[writer]) {
      return true;
    }
  }
  return false;
}

BlockOrder order_blocks(const int64_t* dst_ids, const int64_t* src_ids, size_t count,
                        const IdTable& dst_table, int64_t row_stride_bytes, int64_t nbytes) {
  return Orderer(dst_ids, src_ids, count, dst_table, row_stride_bytes, nbytes).order();
}

}  // namespace llmdd
