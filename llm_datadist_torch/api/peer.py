# SPDX-License-Identifier: Apache-2.0
"""``Peer``: another instance, and what can be moved from and to it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from llm_datadist_torch.api import prepare
from llm_datadist_torch.api.datadist import LLMDataDist
from llm_datadist_torch.api.forms import same_parameters
from llm_datadist_torch.api.keys import KeyLike
from llm_datadist_torch.api.layers import LayerPull, LayerPush
from llm_datadist_torch.api.prepare import Blocks
from llm_datadist_torch.api.transfer import PreparedTransfer, finish, milliseconds
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.links.info import LinkInfo
from llm_datadist_torch.memory.streams import Stream
from llm_datadist_torch.values.cluster_info import LLMClusterInfo
from llm_datadist_torch.values.status import LLMStatusCode, error_for

if TYPE_CHECKING:
    from typing_extensions import Self


class Peer:
    """A linked instance: ``Node.connect`` makes it.

    Keys name caches of the peer: the ``name`` that it gave to a blocks cache, or one of
    :class:`BlocksKey`, :class:`RequestKey`, :class:`PrefixKey` and :class:`RowKey`. A lost link is
    relinked by the next transfer. As a context manager it disconnects on exit.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self, node: object, datadist: LLMDataDist, cluster_id: int, address: str) -> None:
        # A peer is of no use without its node, which closes itself when nobody refers to it.
        self._node = node
        self._datadist = datadist
        self._cluster_id = cluster_id
        self._address = address

    @property
    def cluster_id(self) -> int:
        """The peer's id."""
        return self._cluster_id

    @property
    def address(self) -> str:
        """Where it was connected to, as given; empty if the peer connected to us."""
        return self._address

    @property
    def link(self) -> LinkInfo | None:
        """State and transports of the link as they are now; None without a link."""
        found = (info for info in self._datadist.links() if info.peer == self._cluster_id)
        return next(found, None)

    # -- pulls ------------------------------------------------------------------------------------

    def pull(
        self,
        key: KeyLike,
        into: Cache,
        src_blocks: Blocks | None = None,
        dst_blocks: Blocks | None = None,
        *,
        row: int = 0,
        layers: range | None = None,
        dst_layers: range | None = None,
        wait_stream: Stream | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Copy from a cache of the peer into one of ours. Blocks until the bytes have landed.

        - Blocks to blocks: block ``dst_blocks[k]`` of ``into`` gets the peer's ``src_blocks[k]``.
        - A row (:class:`RequestKey`, :class:`PrefixKey`, :class:`RowKey`) to blocks: the row is cut
          into ``dst_blocks`` in order.
        - A row to a row: ``into`` is a contiguous cache, and its ``row`` is written.

        Args:
            key: The peer's cache or row.
            into: Cache written, in device or host memory.
            src_blocks: The peer's blocks: list, tuple or 1-D int64 tensor. None: the same as
                ``dst_blocks``. Not for rows.
            dst_blocks: Blocks of ``into``, each once. None: the same as ``src_blocks``; all of
                ``into`` if neither is given.
            row: Row of ``into``, where that is a contiguous cache.
            layers: The peer's layers. None: all.
            dst_layers: Layers of ``into``, as many. None: the same as ``layers``.
            wait_stream: No byte moves before what is on this stream now is done. None: the calling
                thread's current stream.
            timeout_s: Seconds that this may take. None: the node's ``timeout_s``.

        Raises:
            LLMParamError: What does not fit, before a byte is written.
            LLMCacheNotFoundError: ``into`` has ended; or the peer has no such cache or row.
            LLMNotLinkedError: The peer isn't linked; as ``LLMPeerLostError`` if it was lost.
            LLMTimeoutError: Not done in time. ``into`` may be partly written, and is not written
                any more.
        """
        transfer = self._pull(key, into, src_blocks, dst_blocks, row, layers, dst_layers)
        transfer.run(wait_stream=wait_stream, timeout_s=timeout_s)

    @same_parameters(pull)
    async def pull_async(self, given: dict[str, Any]) -> None:
        """:meth:`pull` while the event loop goes on.

        Cancelling the coroutine cancels the transfer, and waits for its end: when CancelledError is
        raised, nothing writes into the cache any more.

        Args: As for :meth:`pull`. What is on ``wait_stream`` at the call is waited for, and
        ``timeout_s`` counts from when the transfer begins to run.

        Raises:
            LLMException: As :meth:`pull`.
            asyncio.CancelledError: It was cancelled; part of the bytes may have landed.
        """
        limits = {name: given.pop(name) for name in ("wait_stream", "timeout_s")}
        await finish(self._pull(*given.values()).start(**limits))

    def pull_layers(
        self,
        key: KeyLike,
        into: Cache,
        src_blocks: Blocks | None = None,
        dst_blocks: Blocks | None = None,
        *,
        row: int = 0,
        layers: range | None = None,
        wait_stream: Stream | None = None,
        timeout_s: float | None = None,
    ) -> LayerPull:
        """:meth:`pull` in the background, layer by layer, so that compute can follow.

        ::

            with peer.pull_layers("kv", cache, blocks) as pull:
                for layer in pull:  # in order, each once it has arrived
                    run_layer(layer)

        Args:
            key: As for :meth:`pull`; so are the others.
            into: Cache written.
            src_blocks: The peer's blocks.
            dst_blocks: Blocks of ``into``.
            row: Row of ``into``.
            layers: Layers, the same on both sides. None: all.
            wait_stream: As for :meth:`pull`; what is on it at the call is waited for.
            timeout_s: Seconds that each layer may take, from when it begins to move.

        Raises:
            LLMParamError: Arguments that contradict each other. All else is reported layer by
                layer.
        """
        blocks = prepare.once(src_blocks, dst_blocks)

        def one_layer(layer: int) -> PreparedTransfer:
            return self._pull(key, into, *blocks, row, range(layer, layer + 1), None)

        wanted = prepare.layer_range(into, layers)
        return LayerPull(wanted, one_layer, timeout_s, wait_stream)

    def prepare_pull(
        self,
        key: KeyLike,
        into: Cache,
        src_blocks: Blocks | None = None,
        dst_blocks: Blocks | None = None,
        *,
        row: int = 0,
        layers: range | None = None,
        dst_layers: range | None = None,
    ) -> PreparedTransfer:
        """Convert the arguments of :meth:`pull` once, to run it many times.

        Args:
            key: As for :meth:`pull`; so are the others.
            into: Cache written.
            src_blocks: The peer's blocks. May be changed after the call.
            dst_blocks: Blocks of ``into``. May be changed after the call.
            row: Row of ``into``.
            layers: The peer's layers.
            dst_layers: Layers of ``into``.

        Raises:
            TypeError: Wrong types.
            LLMParamError: Arguments that contradict each other.
        """
        blocks = prepare.once(src_blocks, dst_blocks)
        return self._pull(key, into, *blocks, row, layers, dst_layers)

    # -- pushes -----------------------------------------------------------------------------------

    def push(
        self,
        key: KeyLike,
        source: Cache,
        src_blocks: Blocks | None = None,
        dst_blocks: Blocks | None = None,
        *,
        row: int = 0,
        layers: range | None = None,
        dst_layers: range | None = None,
        wait_stream: Stream | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Copy from a cache of ours into one of the peer. Blocks until the bytes have landed.

        Blocks go to a blocks cache (its name, or a :class:`BlocksKey`), a row of a contiguous cache
        to a row (:class:`RowKey`).

        Args:
            key: The peer's cache or row.
            source: Cache read; not to be written meanwhile.
            src_blocks: Blocks of ``source``: list, tuple or 1-D int64 tensor. None: the same as
                ``dst_blocks``; all of ``source`` if neither is given.
            dst_blocks: The peer's blocks, each once. None: the same as ``src_blocks``.
            row: Row of ``source``, where that is a contiguous cache.
            layers: Layers of ``source``. None: all.
            dst_layers: The peer's layers, as many. None: the same as ``layers``.
            wait_stream: No byte moves before what is on this stream now is done. None: the calling
                thread's current stream.
            timeout_s: Seconds that this may take. None: the node's ``timeout_s``.

        Raises:
            LLMParamError: What does not fit, before a byte is written.
            LLMCacheNotFoundError: ``source`` has ended; or the peer has no such cache or row.
            LLMNotLinkedError: The peer isn't linked; as ``LLMPeerLostError`` if it was lost.
            LLMTimeoutError: Not done in time. The peer's cache may be partly written.
        """
        transfer = self._push(key, source, src_blocks, dst_blocks, row, layers, dst_layers)
        transfer.run(wait_stream=wait_stream, timeout_s=timeout_s)

    @same_parameters(push)
    async def push_async(self, given: dict[str, Any]) -> None:
        """:meth:`push` while the event loop goes on.

        Cancelling the coroutine cancels the transfer, and waits for its end: when CancelledError is
        raised, nothing reads the cache any more.

        Args: As for :meth:`push`. What is on ``wait_stream`` at the call is waited for, and
        ``timeout_s`` counts from when the transfer begins to run.

        Raises:
            LLMException: As :meth:`push`.
            asyncio.CancelledError: It was cancelled; part of the bytes may have landed.
        """
        limits = {name: given.pop(name) for name in ("wait_stream", "timeout_s")}
        await finish(self._push(*given.values()).start(**limits))

    def push_layers(
        self,
        key: KeyLike,
        source: Cache,
        src_blocks: Blocks | None = None,
        dst_blocks: Blocks | None = None,
        *,
        row: int = 0,
        layers: range | None = None,
        timeout_s: float | None = None,
    ) -> LayerPush:
        """:meth:`push` in the background, each layer as soon as it has been computed.

        ::

            with peer.push_layers("kv", cache, blocks) as push:
                for layer in range(32):
                    run_layer(layer)
                    push.ready(layer)  # sent once the current stream has done what is on it now

        Args:
            key: As for :meth:`push`; so are the others.
            source: Cache read, with any number of tensors per layer.
            src_blocks: Blocks of ``source``.
            dst_blocks: The peer's blocks.
            row: Row of ``source``.
            layers: Layers, the same on both sides. None: all.
            timeout_s: Seconds that each layer may take, from when it begins to move.

        Raises:
            LLMParamError: Arguments that contradict each other. All else is reported when the
                block ends, or by ``wait``.
        """
        blocks = prepare.once(src_blocks, dst_blocks)

        def one_layer(layer: int) -> PreparedTransfer:
            return self._push(key, source, *blocks, row, range(layer, layer + 1), None)

        wanted = prepare.layer_range(source, layers)
        one_layer(wanted.start)  # arguments that contradict each other are found now
        return LayerPush(wanted, one_layer, timeout_s)

    def prepare_push(
        self,
        key: KeyLike,
        source: Cache,
        src_blocks: Blocks | None = None,
        dst_blocks: Blocks | None = None,
        *,
        row: int = 0,
        layers: range | None = None,
        dst_layers: range | None = None,
    ) -> PreparedTransfer:
        """Convert the arguments of :meth:`push` once, to run it many times.

        Args:
            key: As for :meth:`push`; so are the others.
            source: Cache read.
            src_blocks: Blocks of ``source``. May be changed after the call.
            dst_blocks: The peer's blocks. May be changed after the call.
            row: Row of ``source``.
            layers: Layers of ``source``.
            dst_layers: The peer's layers.

        Raises:
            TypeError: Wrong types.
            LLMParamError: Arguments that contradict each other.
        """
        blocks = prepare.once(src_blocks, dst_blocks)
        return self._push(key, source, *blocks, row, layers, dst_layers)

    # -- the link ---------------------------------------------------------------------------------

    def disconnect(self, *, force: bool = False, timeout_s: float = 3.0) -> None:
        """End the link, after the transfers that run on it. Without a link nothing happens.

        Args:
            force: End this side only, whether the peer is there or not.
            timeout_s: Seconds to wait for transfers.

        Raises:
            LLMTimeoutError: Transfers took longer; the link is kept.
            LLMLinkError: The peer can't be reached; the link is kept. Use ``force``.
        """
        timeout = milliseconds(timeout_s) or 1
        link = self.link
        if link is None:
            return
        # With a peer that is lost there is nothing to agree on.
        force = force or link.state == "lost"
        info = LLMClusterInfo()
        info.remote_cluster_id = self._cluster_id
        # Looked at only for peers that are not linked, but it has to be there.
        info.append_remote_ip_info("127.0.0.1", 1)
        status, _ = self._datadist.unlink_clusters([info], timeout, force=force)
        if status != LLMStatusCode.LLM_SUCCESS:
            text = f"the link to cluster {self._cluster_id} is kept"
            raise error_for(status, text, op="disconnect", peer=self._cluster_id)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect, on this side at least."""
        if self._datadist.initialised:
            self.disconnect(force=True)

    def __repr__(self) -> str:
        state = "closed"
        if self._datadist.initialised:
            link = self.link
            state = "not linked" if link is None else link.state
        at = f" at {self._address}" if self._address else ""
        return f"Peer(cluster_id={self._cluster_id}{at}, {state})"

    def _pull(self, *given: Any) -> PreparedTransfer:  # noqa: ANN401
        return prepare.pull(self._datadist.cache_manager, self._cluster_id, *given)

    def _push(self, *given: Any) -> PreparedTransfer:  # noqa: ANN401
        return prepare.push(self._datadist.cache_manager, self._cluster_id, *given)
