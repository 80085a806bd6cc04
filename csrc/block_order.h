// SPDX-License-Identifier: Apache-2.0
// In which order blocks are copied within one tensor so that every destination gets what its source
// held before. Torch-free.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "runs.h"

namespace llmdd {

// Positions of block ids in a list of them; a small hash table, because one made of
// std::unordered_map costs more than the copy of a few blocks.
class IdTable {
 public:
  static constexpr int64_t kNone = -1;

  explicit IdTable(size_t count);
  // Remembers `position` for `id` and returns the position remembered before, or kNone.
  int64_t insert(int64_t id, int64_t position);
  int64_t find(int64_t id) const;

 private:
  struct Slot {
    int64_t id;
    int64_t position;
  };
  size_t slot_of(int64_t id) const;

  std::vector<Slot> slots_;
  unsigned shift_;
};

// One step of an ordered copy within a tensor. A cycle is cut open by saving the one block that is
// overwritten before it is read.
struct OrderedStep {
  enum class Kind { kCopy, kSave, kRestore };
  Kind kind;
  Run run;  // kSave has no destination, kRestore no source
};

struct BlockOrder {
  std::vector<OrderedStep> steps;
  int64_t staging_bytes = 0;  // what a thread needs to keep one saved block; 0 without a cycle
};

// True if some block is read by one pair and written by another one. `dst_table` maps each
// destination to its position; pairs that copy a block to itself count as neither.
bool pairs_interfere(const int64_t* dst_ids, const int64_t* src_ids, size_t count,
                     const IdTable& dst_table);

// Orders the pairs: who reads a block comes before who writes it. Destinations must be distinct.
// Pairs that copy a block to itself are dropped.
BlockOrder order_blocks(const int64_t* dst_ids, const int64_t* src_ids, size_t count,
                        const IdTable& dst_table, int64_t row_stride_bytes, int64_t nbytes);

}  // namespace llmdd
