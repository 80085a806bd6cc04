# SPDX-License-Identifier: Apache-2.0
"""``CacheManager``: all public operations on the caches of one instance."""

from __future__ import annotations

from llm_datadist_torch.manager.asynchronous import AsynchronousMovement
from llm_datadist_torch.manager.lifetime import CacheLifetime
from llm_datadist_torch.manager.movement import CacheMovement


class CacheManager(CacheLifetime, CacheMovement, AsynchronousMovement):
    """Caches of one instance: ``LLMDataDist.cache_manager``.

    A call whose name ends in ``_async`` returns a ``CacheTask`` at once. Every other call blocks
    until its work is done: on return the data has landed. Only a layer synchronizer waits for the
    caller's own compute; otherwise make source data complete first. Ids may be lists, tuples or 1-D
    int64 tensors (which cost less).

    Every method raises TypeError for an argument of a wrong type, ValueError for an int outside its
    C width, and an ``LLMException`` after the instance has been finalized.

    Thread safety: all methods may be called from any thread; transfers on one link take turns. Two
    operations that write the same bytes at once are a data race, as with any tensor.
    """
