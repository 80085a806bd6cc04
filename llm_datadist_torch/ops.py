# SPDX-License-Identifier: Apache-2.0
"""Copies between tensors as torch ops; see :mod:`llm_datadist_torch.movement.ops`."""

from llm_datadist_torch.movement.ops import as_ids, copy_blocks, copy_rows, swap_blocks

__all__ = ["as_ids", "copy_blocks", "copy_rows", "swap_blocks"]
