# SPDX-License-Identifier: Apache-2.0
"""``Node``: one instance of the front door, with its caches and its peers."""

from __future__ import annotations

import operator
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from llm_datadist_torch.api import addresses, checks
from llm_datadist_torch.api.cache_manager import CacheManager
from llm_datadist_torch.api.datadist import LLMDataDist
from llm_datadist_torch.api.keys import BlocksKey, PrefixKey, RequestKey
from llm_datadist_torch.api.peer import Peer
from llm_datadist_torch.api.transfer import milliseconds
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.links.events import LinkCallback, LinkListener
from llm_datadist_torch.observe import html
from llm_datadist_torch.observe.stats import Stats
from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.checks import check_isinstance, check_uint64, param_error
from llm_datadist_torch.values.cluster_info import LLMClusterInfo
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.keys import INVALID_ID, CacheKey
from llm_datadist_torch.values.status import (
    LLMException,
    LLMLinkError,
    LLMStatusCode,
    LLMTimeoutError,
    error_for,
)

if TYPE_CHECKING:
    from typing_extensions import Self

PlacementName: TypeAlias = Literal["device", "host"]

_PLACEMENTS = {"device": Placement.DEVICE, "host": Placement.HOST}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5

live_nodes: weakref.WeakSet[Node] = weakref.WeakSet()
"""All nodes of this process that something refers to."""


class Node:
    """One instance: its caches, and its links to peers. :func:`open` makes it.

    It stands on an ``LLMDataDist``, which is :attr:`datadist`; both can be used side by side.

    A node that :func:`open` made closes itself, with a ``ResourceWarning``, when nothing refers to
    it any more. As a context manager it closes on exit. Peers keep their node, caches don't: those
    of a closed node refuse use, and tensors that were taken from them stay valid.

    Thread safety: all methods may be called from any thread.

    Args:
        datadist: An initialised instance.
        owns: Whether it is to be finalized when the node is dropped; else its maker does that.
    """

    _owns = False  # for __del__, where __init__ has raised

    def __init__(self, datadist: LLMDataDist, *, owns: bool = False) -> None:
        check_isinstance("datadist", datadist, LLMDataDist, allow_none=False)
        self._datadist = datadist
        self._owns = owns
        self._named: dict[str | int, Cache] = {}
        self._addresses: dict[int, str] = {}
        live_nodes.add(self)

    # -- what it is -------------------------------------------------------------------------------

    @property
    def cluster_id(self) -> int:
        """Its id among peers."""
        return self._datadist.cluster_id

    @property
    def address(self) -> str | None:
        """Where it listens, as peers on this host may :meth:`connect` to it; None if it doesn't."""
        listening = self._datadist.listen_address
        return None if listening is None else addresses.format_address(*listening)

    @property
    def datadist(self) -> LLMDataDist:
        """The instance of the reference API that it stands on."""
        return self._datadist

    @property
    def cache_manager(self) -> CacheManager:
        """The operations of the reference API on its caches.

        Raises:
            RuntimeError: The node is closed.
        """
        return self._datadist.cache_manager

    @property
    def device(self) -> torch.device:
        """Where caches in ``placement="device"`` are.

        Raises:
            RuntimeError: The node is closed.
        """
        return self._datadist.device

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return not self._datadist.initialised

    def stats(self) -> Stats:
        """Caches, pools, links, and what transfers have done so far; see ``LLMDataDist.stats``.

        Raises:
            RuntimeError: The node is closed.
        """
        return self._datadist.stats()

    # -- caches -----------------------------------------------------------------------------------

    def allocate(
        self,
        *,
        layers: int,
        shape: Sequence[int],
        blocks: int | None = None,
        rows: int | None = None,
        dtype: torch.dtype | None = None,
        tensors_per_layer: int = 2,
        placement: PlacementName = "device",
        name: str | int | None = None,
        keys: Sequence[RequestKey | PrefixKey | None] = (),
        replace: bool = False,
    ) -> Cache:
        """Make a cache in new memory. The contents are not defined.

        Args:
            layers: Layers.
            shape: Shape of one block, or of one row, in one tensor.
            blocks: Number of blocks, for a blocks cache. Either this or ``rows``.
            rows: Number of rows, for a contiguous cache.
            dtype: Element type. None: torch's default.
            tensors_per_layer: Tensors of a layer: 2 for K and V, 1 for a joint latent.
            placement: "device", or "host" for memory to swap to.
            name: What peers call a blocks cache.
            keys: What peers call the rows of a contiguous cache, in order; None skips a row.
            replace: Free this node's cache of the same name first.

        Returns:
            A cache of ``layers * tensors_per_layer`` tensors of shape ``[blocks, *shape]``, which
            owns its memory.

        Raises:
            TypeError: Wrong types.
            LLMParamError: Sizes that are no cache, or a name or key that is bound already.
            LLMOutOfMemoryError: No room.
        """
        is_paged = checks.paged(blocks, rows, name, keys)
        count = operator.index(blocks if is_paged and blocks is not None else rows or 0)
        dims = [count, *(operator.index(size) for size in shape)]
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_isinstance("dtype", dtype, torch.dtype, allow_none=False)
        place = checks.choice("placement", placement, _PLACEMENTS)
        desc = CacheDesc(checks.num_tensors(layers, tensors_per_layer), dims, dtype, place)
        manager = self.cache_manager
        if is_paged:
            self._make_name_free(name, replace=replace)
            key = None if name is None else BlocksKey(name).at(self.cluster_id)
            cache = manager.allocate_blocks_cache(desc, key)
        else:
            cache = manager.allocate_cache(desc, self._row_keys(keys))
        return self._keep(cache, name, tensors_per_layer)

    def register(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        paged: bool = True,
        tensors_per_layer: int = 2,
        placement: PlacementName | None = None,
        name: str | int | None = None,
        keys: Sequence[RequestKey | PrefixKey | None] = (),
        replace: bool = False,
    ) -> Cache:
        """Make a cache of tensors that exist already. Copies nothing.

        Args:
            tensors: Layer by layer; all of one shape and dtype, dimension 0 is the blocks or rows.
                They may be views whose blocks are each contiguous. The cache keeps them alive.
            paged: Whether dimension 0 counts blocks; else rows.
            tensors_per_layer: Tensors of a layer.
            placement: None: "device" if they are where :attr:`device` is, else "host".
            name: What peers call a blocks cache.
            keys: What peers call the rows of a contiguous cache, in order; None skips a row.
            replace: Free this node's cache of the same name first.

        Returns:
            A cache of these tensors. :meth:`free` ends it.

        Raises:
            TypeError: Wrong types.
            LLMParamError: Tensors that are no cache, or a name or key that is bound already.
        """
        given = list(tensors)
        for at, tensor in enumerate(given):
            check_isinstance(f"tensors[{at}]", tensor, torch.Tensor, allow_none=False)
        if not given:
            raise param_error("tensors is empty")
        checks.paged(1 if paged else None, None if paged else 1, name, keys)
        if placement is None:
            placement = "device" if given[0].device.type == self.device.type else "host"
        place = checks.choice("placement", placement, _PLACEMENTS)
        if len(given) % operator.index(tensors_per_layer):
            raise param_error(f"{len(given)} tensors are no multiple of {tensors_per_layer=}")
        desc = CacheDesc(len(given), list(given[0].shape), given[0].dtype, place)
        manager = self.cache_manager
        if paged:
            self._make_name_free(name, replace=replace)
            key = None if name is None else BlocksKey(name).at(self.cluster_id)
            cache = manager.register_blocks_cache(desc, given, key, remote_accessible=True)
        else:
            row_keys = self._row_keys(keys)
            cache = manager.register_cache(desc, given, row_keys, remote_accessible=True)
        return self._keep(cache, name, tensors_per_layer)

    def cache(self, name: str | int) -> Cache:
        """Return the blocks cache of this node that has a name.

        Raises:
            KeyError: There is none.
        """
        cache = self._named.get(name)
        if cache is None or cache.ended:
            raise KeyError(name)
        return cache

    def free(self, cache: Cache, *, timeout_s: float | None = None) -> None:
        """End a cache and its name. Its memory ends when nothing uses it any more. Idempotent.

        Blocks only for registered tensors: while peers use them.

        Args:
            cache: A cache of this node.
            timeout_s: Seconds to wait for peers. None: the node's ``timeout_s``.

        Raises:
            LLMParamError: A cache of another node.
            LLMTimeoutError: A peer still uses registered tensors; the cache is kept.
        """
        check_isinstance("cache", cache, Cache, allow_none=False)
        manager, timeout = self.cache_manager, milliseconds(timeout_s)
        if cache.ended:
            return
        if cache.is_registered:
            manager.unregister_cache(cache.cache_id, timeout=timeout)
        elif cache.is_blocks_cache:
            manager.deallocate_blocks_cache(cache)
        else:
            manager.deallocate_cache(cache)

    def copy_blocks(
        self,
        cache: Cache,
        src_to_dst: Mapping[int, int] | Mapping[int, list[int]] | torch.Tensor,
        *,
        non_blocking: bool = False,
    ) -> None:
        """Copy whole blocks within a cache, in every tensor, as if all at once.

        Args:
            cache: Blocks cache.
            src_to_dst: Source block -> destination block, or list of them; or an int64 tensor
                [n, 2].
            non_blocking: Leave the copies on the device's current stream.

        Raises:
            LLMParamError: A contiguous cache, a block out of range, a destination named twice.
            LLMCacheNotFoundError: The cache has ended, or is another node's.
        """
        if isinstance(src_to_dst, Mapping):
            src_to_dst = {s: d if isinstance(d, list) else [d] for s, d in src_to_dst.items()}
        self.cache_manager.copy_blocks(cache, src_to_dst, non_blocking=non_blocking)

    def swap_blocks(
        self,
        source: Cache,
        target: Cache,
        src_to_dst: Mapping[int, int] | torch.Tensor,
        *,
        non_blocking: bool = False,
    ) -> None:
        """Copy whole blocks between a host cache and a device cache, one way, in every tensor.

        Args:
            source: Blocks cache read.
            target: Blocks cache written, in the other placement.
            src_to_dst: Source block -> destination block; or an int64 tensor [n, 2].
            non_blocking: Leave the copies on the device's current stream.

        Raises:
            LLMParamError: Caches that don't fit, a block out of range, a destination named twice.
        """
        self.cache_manager.swap_blocks(source, target, src_to_dst, non_blocking=non_blocking)

    # -- peers ------------------------------------------------------------------------------------

    def connect(self, address: str | tuple[str, int], *, timeout_s: float = 5.0) -> Peer:
        """Link to the node that listens at an address; a link that is there is used.

        Blocks until it has answered. While nobody listens there it tries again, so that nodes may
        start in any order. Looking up a host name takes as long as the resolver does.

        Args:
            address: "host:port"; host is a name, an IPv4 address, or an IPv6 address in brackets.
                Or the pair of both.
            timeout_s: Seconds to try.

        Raises:
            TypeError: ``address`` is neither text nor a pair.
            LLMParamError: It is not an address, or this node's own; or the peer's
                ``remote_accessible`` is another.
            LLMLinkError: Nobody listens there, the name is not known, or ``link_secret`` is
                another.
            LLMTimeoutError: No answer in time.
        """
        host, port = addresses.peer_address(address)
        end = time.monotonic() + (milliseconds(timeout_s) or 1) / 1000
        peer, ip = self._find(host, port, end)
        text = addresses.format_address(host, port)
        if peer == self.cluster_id:
            raise param_error(f"{text} is this node itself", remedy="use copy_blocks.")
        self._addresses[peer] = text
        if not self._linked(peer):
            self._link(peer, ip, port, text, end)
        return Peer(self, self._datadist, peer, text)

    def peer(self, cluster_id: int) -> Peer:
        """Return a peer that is linked, for example one that has connected to us.

        Raises:
            LLMNotLinkedError: There is no link to it.
        """
        cluster_id = check_uint64("cluster_id", cluster_id)
        if all(info.peer != cluster_id for info in self._datadist.links()):
            raise error_for(
                LLMStatusCode.LLM_NOT_YET_LINK,
                f"cluster {cluster_id} is not linked",
                peer=cluster_id,
                remedy="connect() to it, or wait until it has connected.",
            )
        return Peer(self, self._datadist, cluster_id, self._addresses.get(cluster_id, ""))

    @property
    def peers(self) -> list[Peer]:
        """All peers that are linked, lost ones too.

        Raises:
            RuntimeError: The node is closed.
        """
        return [self.peer(info.peer) for info in self._datadist.links()]

    def on_link_event(self, callback: LinkCallback) -> LinkListener:
        """Be told when links are made, lost, relinked and ended; see ``LLMDataDist``.

        Args:
            callback: Called with each ``LinkEvent``, from a thread that serves nothing else.

        Returns:
            Its ``remove()`` ends that.
        """
        return self._datadist.on_link_event(callback)

    # -- life -------------------------------------------------------------------------------------

    def close(self, *, timeout_s: float | None = None) -> None:
        """End all links and caches, and stop listening. Idempotent.

        Waits for transfers that are under way, on either side, and cuts off those that take longer.
        Tensors that were taken from caches stay valid.

        Args:
            timeout_s: Seconds to wait for transfers. None: the node's ``timeout_s``.
        """
        self._datadist.finalize(timeout=milliseconds(timeout_s))
        self._named.clear()

    def __enter__(self) -> Self:
        """The node itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close a node that was dropped. In a thread, because a collector may run anywhere."""
        if not self._owns or self.closed:
            return
        text = f"{self!r} was dropped without close(); use it in a with statement"
        warnings.warn(text, ResourceWarning, stacklevel=2, source=self)
        try:
            threading.Thread(target=self._datadist.finalize, name="llm_datadist_torch.drop").start()
        except RuntimeError:  # the interpreter is ending: no threads any more, nobody to wait for
            self._datadist.finalize()

    def _repr_html_(self) -> str:
        """What notebooks show: memory, links and the latest transfers."""
        title = f"Node {self.cluster_id}"
        if self.closed:
            return html.facts_html(title, [("state", "closed")])
        return html.stats_html(title, self.stats())

    def __repr__(self) -> str:
        if self.closed:
            return f"Node(cluster_id={self.cluster_id}, closed)"
        at = "not listening" if self.address is None else f"listening at {self.address}"
        links = self._datadist.links()
        return f"Node(cluster_id={self.cluster_id}, {at}, on {self.device}, {len(links)} link(s))"

    # -- helpers ----------------------------------------------------------------------------------

    def _row_keys(self, keys: Sequence[RequestKey | PrefixKey | None]) -> list[CacheKey]:
        for at, key in enumerate(keys):
            check_isinstance(f"keys[{at}]", key, (RequestKey, PrefixKey))
        skip = CacheKey(self.cluster_id, INVALID_ID)
        return [skip if key is None else key.at(self.cluster_id) for key in keys]

    def _make_name_free(self, name: str | int | None, *, replace: bool) -> None:
        check_isinstance("replace", replace, bool, allow_none=False)
        held = None if name is None else self._named.get(name)
        if held is None or held.ended:
            return
        if not replace:
            raise param_error(
                f"the name {name!r} is taken by {held!r}",
                remedy="free() that one, give replace=True, or take another name.",
            )
        self.free(held)

    def _keep(self, cache: Cache, name: str | int | None, tensors_per_layer: int) -> Cache:
        cache.group_layers(tensors_per_layer)
        if name is not None:
            cache.set_name(name)
            self._named[name] = cache
        return cache

    def _linked(self, peer: int) -> bool:
        return any(i.peer == peer and i.state == "linked" for i in self._datadist.links())

    def _find(self, host: str, port: int, end: float) -> tuple[int, str]:
        """Cluster id and numeric address of who listens; tries each address of a host in turn."""
        pause = _FIRST_PAUSE_S
        while True:
            candidates = addresses.resolve(host, port)
            for number, (ip, _) in enumerate(candidates):
                share = max(1, int((end - time.monotonic()) * 1000 / (len(candidates) - number)))
                try:
                    return self._datadist.identify(ip, port, share), ip
                except (LLMLinkError, LLMTimeoutError) as error:
                    failure: LLMException = error
            if time.monotonic() + pause > end:
                raise failure
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _link(self, peer: int, ip: str, port: int, text: str, end: float) -> None:
        info = LLMClusterInfo()
        info.remote_cluster_id = peer
        info.append_local_ip_info("127.0.0.1", 0)  # has no effect, but has to be there
        info.append_remote_ip_info(ip, port)
        left = max(1, int((end - time.monotonic()) * 1000))
        status, _ = self._datadist.link_clusters([info], left)
        if status != LLMStatusCode.LLM_SUCCESS and not self._linked(peer):
            raise error_for(
                status, f"linking to cluster {peer} at {text} failed", op="connect", peer=peer
            )
