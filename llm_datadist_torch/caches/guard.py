# SPDX-License-Identifier: Apache-2.0
"""The guard of a cache: its leases, and the proof that its tensors are where the cache says.

torch replaces the memory of a tensor in place, and tells nobody. So addresses are compared under
each lease; see :class:`llm_datadist_torch._C.CacheGuard`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

MOVING_OPERATIONS = (
    "share_memory_() and sending a tensor through torch.multiprocessing,"
    " untyped_storage().resize_() and resize_(), set_(), and assigning to .data"
)
"""What replaces the memory of a tensor that somebody else refers to
(findings/torch_share_memory_moves_views.sh)."""


def make_guard(
    name: str,
    addrs: torch.Tensor,
    nbytes: int,
    tensors: Sequence[torch.Tensor] = (),
    cache_id: int | None = None,
) -> _C.CacheGuard:
    """The guard of one cache. It keeps the memory of ``tensors`` until ``forget()``.

    Args:
        name: What messages call the cache, such as "cache 3".
        addrs: Where the cache says that its tensors are, int64 [num_tensors].
        nbytes: Bytes of each, from its first row to the end of its last.
        tensors: Tensor k must be at ``addrs[k % num_tensors]``; several may stand for one.
        cache_id: Its id, for errors.
    """
    refuse = functools.partial(_refusal, name, cache_id)
    guard = _C.CacheGuard(addrs.tolist(), nbytes, refuse)
    if tensors:
        _C.watch_tensors(list(tensors), guard.handle)
    return guard


def _refusal(
    name: str, cache_id: int | None, outcome: str, index: int, was: int, now: int
) -> LLMException:
    """Why no lease is given: what the guard raises."""
    remedy = ""
    if outcome == "ended":
        message = f"{name} was freed meanwhile"
    elif outcome == "draining":
        message = f"{name} is being unregistered"
    else:
        place = f"{now:#x}" if now else "nowhere (its storage is empty)"
        message = (
            f"tensor {index} of {name} has moved from {was:#x} to {place}: its memory was replaced,"
            f" as is done by {MOVING_OPERATIONS}. Its owner has to end the cache and make a new one"
            " of the tensors as they are now"
        )
        remedy = "keep the tensors of a cache in place, and copy into them (copy_)."
    return error_for(
        LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, message, cache_id=cache_id, remedy=remedy
    )
