# SPDX-License-Identifier: Apache-2.0
"""What vLLM has counted as external hits, and that could not be loaded."""

from __future__ import annotations

from collections.abc import Collection

from llm_datadist_torch.vllm.observing import FAILED_TOKENS, Record
from llm_datadist_torch.vllm.params import NULL_BLOCK, BlockIds


class ExternalHits:
    """Counts the tokens of failed loads, each request once, however many workers load it.

    vLLM counts a request's external hits when it allocates its blocks, before anything is loaded,
    and takes no hit back (``Scheduler.schedule``, ``connector_prefix_cache_stats``). So what was
    counted and did not come is counted here.

    Thread safety: none; all methods are called by the engine's loop, and don't block.

    Args:
        record: Where the tokens are counted.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._loading: dict[str, tuple[int, frozenset[int]]] = {}

    def allocated(self, request_id: str, blocks: BlockIds, num_tokens: int) -> None:
        """A request has blocks, into which so many tokens are loaded; 0: nothing is loaded."""
        if num_tokens:
            numbers = frozenset(block for group in blocks for block in group) - {NULL_BLOCK}
            self._loading[request_id] = num_tokens, numbers

    def failed(self, request_ids: Collection[str], blocks: Collection[int]) -> None:
        """Some loads have failed.

        Args:
            request_ids: Requests that could not be loaded.
            blocks: Blocks that could not be loaded, of whichever request. One worker may say so in
                an earlier step than the last worker says that the load has ended.
        """
        if not request_ids and not blocks:
            return
        for request_id, (num_tokens, numbers) in list(self._loading.items()):
            if request_id in request_ids or not numbers.isdisjoint(blocks):
                del self._loading[request_id]
                self._record.count(FAILED_TOKENS, num_tokens)

    def ended(self, request_ids: Collection[str]) -> None:
        """The loads of these requests have ended, or the requests have. Others are left alone."""
        for request_id in request_ids:
            self._loading.pop(request_id, None)
