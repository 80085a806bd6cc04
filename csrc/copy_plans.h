// SPDX-License-Identifier: Apache-2.0
// The arguments of the copy ops, checked, and what they ask for: the part that all devices share.
// Torch-free.

#pragma once

#include <cstdint>
#include <vector>

#include "block_order.h"
#include "op_checks.h"
#include "runs.h"

namespace llmdd {

// Blocks copied within each tensor of a list.
struct BlocksPlan {
  TensorRows all;
  Ids dst_ids;
  Ids src_ids;
  IdTable table;           // of the destinations
  bool nothing = false;    // no byte is to move
  bool interfere = false;  // some block is both read and written, so that the order matters

  // What to copy if nothing interferes; blocks copied onto themselves are left out.
  std::vector<Run> runs() const;
  BlockOrder order() const;
};

// Rows copied from a list of tensors to another one.
struct RowsPlan {
  TensorRows to;
  TensorRows from;
  std::vector<Run> runs;  // empty if no byte is to move
};

// Each throws ValueError or IndexError for what is wrong with its arguments, before a byte moves.
BlocksPlan plan_copy_blocks(TensorRows tensors, Ids src_ids, Ids dst_ids);
RowsPlan plan_swap_blocks(TensorRows dst, TensorRows src, const Ids& dst_ids, const Ids& src_ids);
RowsPlan plan_copy_rows(const TensorRows& dst, const TensorRows& src, int64_t dst_row,
                        int64_t src_row, int64_t offset, int64_t nbytes);

}  // namespace llmdd
