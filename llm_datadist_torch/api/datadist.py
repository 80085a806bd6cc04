# SPDX-License-Identifier: Apache-2.0
"""``LLMDataDist``: one instance, its life and its links."""

from __future__ import annotations

import atexit
import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from llm_datadist_torch.values.checks import (
    check_isinstance,
    check_timeout_ms,
    check_uint16,
    check_uint64,
    param_error,
)
from llm_datadist_torch.values.cluster_info import LLMClusterInfo
from llm_datadist_torch.values.config import EngineConfig, role_to_str
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.enums import LLMRole, RegisterMemStatus
from llm_datadist_torch.values.loading import LazyModule
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from llm_datadist_torch.api import machinery
    from llm_datadist_torch.api.cache_manager import CacheManager
    from llm_datadist_torch.links.events import LinkCallback, LinkListener
    from llm_datadist_torch.links.info import LinkInfo
    from llm_datadist_torch.links.instance import Instance
    from llm_datadist_torch.links.linking import LinkResult
    from llm_datadist_torch.links.questions import QuestionHandler
    from llm_datadist_torch.observe.stats import Stats
else:
    machinery = LazyModule("llm_datadist_torch.api.machinery")

logger = logging.getLogger("llm_datadist_torch")


class LLMDataDist:
    """One instance: caches that peers can reach, and links to peers.

    Several may live in one process.

    Life cycle: construct, :meth:`init`, use :attr:`cache_manager` and :meth:`link_clusters`,
    :meth:`finalize`. As a context manager it finalizes itself. At interpreter exit live instances
    are finalized.

    Thread safety: ``init`` and ``finalize`` take turns; the rest may be called from any thread.

    Args:
        role: What this instance does in the service; it never affects transfers.
        cluster_id: Its name, unique among linked peers, an unsigned 64-bit number.

    Raises:
        TypeError: Wrong types.
        ValueError: ``cluster_id`` is no unsigned 64-bit number.
    """

    llm_engine_instance: ClassVar[LLMDataDist | None] = None
    """The live instance that was initialised last, or None."""

    # Peers may be reading the caches of an instance that nobody here refers to any more, and its
    # thread keeps its parts alive anyway: what is initialised lives until finalize or exit.
    _live: ClassVar[set[LLMDataDist]] = set()
    _exit_registered: ClassVar[bool] = False

    def __init__(self, role: LLMRole, cluster_id: int) -> None:
        check_isinstance("role", role, LLMRole)
        self._role = role
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._options: dict[str, str] = {}
        self._instance: Instance | None = None
        self._ending: Instance | None = None
        self._manager: CacheManager | None = None
        self._life = threading.Lock()

    def init(self, options: dict[str, str]) -> None:
        """Start the instance: take the pools, listen (reference API, 6.2).

        Does nothing if it is initialised already. The first in a process also loads most of this
        package, some tenths of a second.

        Args:
            options: ``LLMConfig.generate_options()``. Not changed.

        Raises:
            AttributeError: ``options`` is None.
            LLMParamError: Options that are wrong or contradict each other.
            LLMOutOfMemoryError: A pool can't be had.
            LLMFeatureNotEnabledError: A device, transport or transfer backend that is not available
                here.
            LLMException: LLM_FAILED: ``listen_ip_info`` can't be bound. The instance stays
                uninitialised and may be tried again.
        """
        new_instance = machinery.Instance  # loads the package, which must not hold the lock
        with self._life:
            if self._instance is not None:
                return
            self._end(None)
            config = EngineConfig.from_options(self._role, options)
            instance = new_instance(self._cluster_id, config)
            own_answers = machinery.statistics.own_answers(instance)
            instance.links.questions.answer_own_by(own_answers)
            self._options = dict(options)
            self._manager = machinery.manager_of(instance)
            self._instance = instance
            LLMDataDist._live.add(self)
            LLMDataDist.llm_engine_instance = self
            if not LLMDataDist._exit_registered:
                LLMDataDist._exit_registered = True
                atexit.register(_shutdown_handler)

    def finalize(self, *, timeout: int | None = None) -> None:
        """End all links and caches, release the pools, stop listening (reference API, 6.4).

        Waits for transfers that are under way, on either side, and cuts off those that take longer;
        idempotent. One that was interrupted (Ctrl-C) is finished by the next, or by :meth:`init`.

        Tensors that the user still holds stay valid. The instance may be initialised again.

        Args:
            timeout: Milliseconds to wait for transfers at most. None: ``sync_kv_timeout``.

        Raises:
            TypeError, ValueError: ``timeout`` is no int32.
            LLMParamError: It is not positive. Nothing has been ended.
        """
        timeout = None if timeout is None else check_timeout_ms(timeout)
        with self._life:
            self._ending = self._instance or self._ending
            self._instance = self._manager = None
            if LLMDataDist.llm_engine_instance is self:
                others = LLMDataDist._live - {self}
                LLMDataDist.llm_engine_instance = next(iter(others), None)
            self._end(timeout)

    def _end(self, timeout: int | None) -> None:
        """End what was initialised before, if anything is left of it. The life lock is held."""
        if self._ending is None:
            return
        try:
            self._ending.close(timeout)
        except LLMException:
            # Which says what could not be waited for: all has been ended.
            self._ending = None
            LLMDataDist._live.discard(self)
            raise
        self._ending = None
        LLMDataDist._live.discard(self)

    def __enter__(self) -> Self:
        """The instance itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Finalize."""
        self.finalize()

    def __repr__(self) -> str:
        """Role, cluster id and whether it is initialised."""
        state = (
            "not initialised" if self._instance is None else f"listening on {self.listen_address}"
        )
        return f"LLMDataDist({self._role!s}, cluster_id={self._cluster_id}, {state})"

    # -- properties -------------------------------------------------------------------------------

    @property
    def cluster_id(self) -> int:
        """Its name among peers."""
        return self._cluster_id

    @property
    def cache_manager(self) -> CacheManager:
        """The operations on its caches, the same object until ``finalize``.

        Raises:
            RuntimeError: Not initialised.
        """
        self._check_is_inited()
        if self._manager is None:
            self._not_inited()
        return self._manager

    @property
    def initialised(self) -> bool:
        """Whether it is between ``init`` and ``finalize`` (not in the reference)."""
        return self._instance is not None

    @property
    def device(self) -> torch.device:
        """Where ``Placement.DEVICE`` caches are: an NPU, or the CPU (not in the reference).

        Raises:
            RuntimeError: Not initialised.
        """
        return self._check_is_inited().device.device

    @property
    def listen_address(self) -> tuple[str, int] | None:
        """Host and port it listens on, or None (not in the reference).

        With port 0 in ``listen_ip_info`` it is the port it got.
        """
        return None if self._instance is None else self._instance.links.endpoint.listen_address

    @property
    def kv_cache_manager(self) -> NoReturn:
        """The v1 manager, which this mode doesn't have.

        Raises:
            RuntimeError: Not initialised.
            LLMParamError: Always otherwise.
        """
        self._check_is_inited()
        raise param_error("kv_cache_manager needs the v1 mode", remedy="use cache_manager.")

    # -- seeing -----------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Caches, pools, links, and what transfers have done so far. Not in the reference.

        Does not block. Only transfers that this instance asked for are counted here.

        Raises:
            RuntimeError: Not initialised.
        """
        return machinery.statistics.look(self._check_is_inited())

    def export_metrics(self, registry: Any = None) -> Any:  # noqa: ANN401
        """Export :meth:`stats` as Prometheus metrics, until ``finalize``. Not in the reference.

        Transfers pay nothing for it: everything is computed when Prometheus scrapes.

        Args:
            registry: A ``prometheus_client.CollectorRegistry``. None: its default.

        Returns:
            The collector, which ``registry.unregister`` takes back.

        Raises:
            RuntimeError: Not initialised.
            LLMFeatureNotEnabledError: ``prometheus_client`` is not installed.
        """
        instance = self._check_is_inited()

        def look() -> Stats | None:
            return machinery.statistics.look(instance) if instance.open else None

        return machinery.metrics.export(look, registry)

    def trace_transfers(self, tracer_provider: Any = None) -> None:  # noqa: ANN401
        """Make an OpenTelemetry span of each transfer from now on. Not in the reference.

        Args:
            tracer_provider: None: OpenTelemetry's global one.

        Raises:
            RuntimeError: Not initialised.
            LLMFeatureNotEnabledError: ``opentelemetry-api`` is not installed.
        """
        instance = self._check_is_inited()
        listener = machinery.tracing.span_listener(instance.cluster_id, tracer_provider)
        instance.transfers.listen(listener)

    def _repr_html_(self) -> str:
        """What notebooks show: memory, links and the latest transfers."""
        title = f"LLMDataDist {self._cluster_id} ({self._role!s})"
        if self._instance is None:
            return machinery.html.facts_html(title, [("state", "not initialised")])
        return machinery.html.stats_html(title, self.stats())

    def check_link_status(self, remote_cluster_id: int) -> NoReturn:  # noqa: ARG002
        """A v1 call, which this mode doesn't have.

        Raises:
            RuntimeError: Not initialised.
            LLMParamError: Always otherwise.
        """
        self._check_is_inited()
        raise param_error(
            "check_link_status needs the v1 mode", remedy="link_clusters() says how linking went."
        )

    def switch_role(self, role: LLMRole, switch_options: dict[str, str] | None = None) -> None:
        """Take another role, and listen where that role should (reference API, 11.3).

        Blocks shortly. Caches stay as they are. The same role is allowed.

        Args:
            role: The new role.
            switch_options: ``llm.listenIpInfo`` says where to listen from now on; without it, it
                listens no more. Other options, such as those of ``generate_options()``, are
                ignored.

        Raises:
            RuntimeError: Not initialised.
            TypeError: Wrong types.
            KeyError: ``role`` is None.
            LLMParamError: Not a listen address.
            LLMLinkError: LLM_EXIST_LINK: there are links.
            LLMException: LLM_FAILED: the address can't be bound. Whatever is raised, role and
                listener are as they were.
        """
        self._check_is_inited()
        listen = machinery.linking.check_role_switch(role, switch_options)
        with self._life:
            machinery.linking.relisten(self._check_is_inited(), listen)
            self._role = role

    # -- links ------------------------------------------------------------------------------------

    def link_clusters(self, clusters: Sequence[LLMClusterInfo], timeout: int = 3000) -> LinkResult:
        """Link to peers, all at once.

        Blocks until each has answered (reference API, 11.1). A link serves both directions.

        Args:
            clusters: The peers: ``remote_cluster_id``, one remote and one local ip info each.
            timeout: Milliseconds for all of them together.

        Returns:
            The overall status (success, or that of the last peer that failed), and one per peer.
            Linking failures are never raised:

            - ``LLM_LINK_FAILED``: connection refused or unreachable, or there is another version of
              this library, another ``link_secret``, or something that does not speak this protocol.
            - ``LLM_TIMEOUT``: no answer in time.
            - ``LLM_ALREADY_LINK``: there is a link to that peer.
            - ``LLM_PARAM_INVALID``: not one ip info, other ``enable_remote_cache_accessible``, or
              another ``remote_cluster_id`` answered.

        Raises:
            RuntimeError: Not initialised.
            TypeError: Wrong types, or a peer without ``remote_cluster_id``.
            ValueError: ``timeout`` outside int32.
            LLMParamError: ``timeout`` not positive, or a peer without local ip info.
        """
        instance = self._check_is_inited()
        timeout = check_timeout_ms(timeout)
        need_local = not self._options.get("llm.LocalCommRes")
        machinery.linking.check_clusters(clusters, need_local=need_local)
        return machinery.linking.link_clusters(
            instance, clusters, Deadline.after_ms(timeout), need_local=need_local
        )

    def unlink_clusters(
        self, clusters: Sequence[LLMClusterInfo], timeout: int = 3000, force: bool = False
    ) -> LinkResult:
        """End links, after the transfers that run on them (reference API, 11.2).

        Transfers of our own that take longer than ``timeout`` keep the link, with LLM_TIMEOUT. For
        a peer's, ``force`` does not wait any longer: they fail, and what they use is not freed
        (``unregister_cache`` waits) before they have stopped, or the peer has died.

        A link that a communicator of :meth:`link` shares stays.

        Args:
            clusters: The peers; ``force=False`` needs one remote ip info each.
            timeout: Milliseconds for all of them together.
            force: End this side only, whether the peer is there or not.

        Returns:
            The overall status and one per peer. Without a link to a reachable peer: success. With
            ``force=False`` and a peer that can't be reached: ``LLM_UNLINK_FAILED`` or
            ``LLM_TIMEOUT``, and the link is kept.

        Raises:
            RuntimeError: Not initialised.
            TypeError: Wrong types, or a peer without ``remote_cluster_id``.
            ValueError: ``timeout`` outside int32.
            LLMParamError: ``timeout`` not positive.
        """
        instance = self._check_is_inited()
        timeout = check_timeout_ms(timeout)
        check_isinstance("force", force, bool, allow_none=False)
        machinery.linking.check_clusters(clusters, need_local=False)
        return machinery.linking.unlink_clusters(
            instance, clusters, Deadline.after_ms(timeout), force=force
        )

    def identify(self, host: str, port: int, timeout: int = 3000) -> int:
        """Ask which cluster listens at an address, without linking to it. Not in the reference.

        Blocks until it has answered. The peer checks the protocol version, ``link_secret`` and
        ``enable_remote_cache_accessible`` as it does for a link.

        Args:
            host: IPv4 or IPv6 address.
            port: Port.
            timeout: Milliseconds.

        Returns:
            The ``remote_cluster_id`` that :meth:`link_clusters` needs.

        Raises:
            RuntimeError: Not initialised.
            TypeError: Wrong types.
            ValueError: ``port`` is not a uint16, or ``timeout`` no int32.
            LLMParamError: ``timeout`` is not positive, or the peer's mode is another.
            LLMLinkError: Connection refused or unreachable, or another ``link_secret``.
            LLMTimeoutError: No answer in time.
            LLMException: LLM_FAILED: the peer does not speak this protocol.
        """
        instance = self._check_is_inited()
        check_isinstance("host", host, str, allow_none=False)
        deadline = Deadline.after_ms(check_timeout_ms(timeout))
        return instance.links.identify(host, check_uint16("port", port), deadline)

    def links(self) -> list[LinkInfo]:
        """All links, lost ones too, with the transports that each uses (not in the reference).

        Raises:
            RuntimeError: Not initialised.
        """
        return [machinery.LinkInfo.of(link) for link in self._check_is_inited().links.links()]

    def on_link_event(self, callback: LinkCallback) -> LinkListener:
        """Be told when links are made, lost, relinked and ended (not in the reference).

        Args:
            callback: Called with each :class:`LinkEvent` from now on, in order and one at a time,
                from a thread that serves nothing else: it may take its time, and use this instance.
                What it raises is logged.

        Returns:
            Its ``remove()`` ends that; so does ``finalize``, after the last events.

        Raises:
            RuntimeError: Not initialised.
            TypeError: ``callback`` can't be called.
        """
        instance = self._check_is_inited()
        if not callable(callback):
            raise TypeError(f"callback must be callable, but is {type(callback).__name__}")
        return instance.links.registry.events.add(callback)

    def request(self, remote_cluster_id: int, payload: bytes, timeout: int | None = None) -> bytes:
        """Ask the program of a linked peer something, and wait for its answer.

        For what programs have to agree on besides the bytes of caches. Requests to one peer arrive
        in order; pulls and pushes don't wait for them. A lost link is relinked, as by a pull. Not
        in the reference.

        Args:
            remote_cluster_id: The peer.
            payload: Whatever it understands, at most 1 MiB.
            timeout: Milliseconds; None: ``sync_kv_timeout``.

        Raises:
            RuntimeError: Not initialised.
            TypeError: Wrong types.
            ValueError: An int outside its width.
            LLMParamError: Too many bytes.
            LLMNotLinkedError: The peer isn't linked, or is lost meanwhile.
            LLMTimeoutError: No answer in time.
            LLMFeatureNotEnabledError: The peer's program answers no requests.
            LLMException: What the peer's handler raised, with its status (LLM_FAILED for other
                errors) and text.
        """
        return machinery.asking.request(
            self._check_is_inited(), remote_cluster_id, payload, timeout
        )

    def send(self, remote_cluster_id: int, payload: bytes) -> None:
        """Send the program of a linked peer something, without waiting for what it answers.

        The peer's handler gets it as a request (:meth:`request`), in order with those; its answer,
        or error, goes nowhere. It may be lost with the link. Blocks to relink a lost link, and
        while 16 earlier ones wait for the peer's handler. Not in the reference.

        Args:
            remote_cluster_id: The peer.
            payload: Whatever it understands, at most 1 MiB.

        Raises:
            RuntimeError: Not initialised.
            TypeError: Wrong types.
            ValueError: An int outside its width.
            LLMParamError: Too many bytes.
            LLMNotLinkedError: The peer isn't linked.
            LLMTimeoutError: The peer's handler has not dealt with earlier ones within
                ``sync_kv_timeout``.
        """
        machinery.asking.send(self._check_is_inited(), remote_cluster_id, payload)

    def on_request(self, handler: QuestionHandler | None) -> None:
        """Answer the requests of peers (:meth:`request`, :meth:`send`). Not in the reference.

        Args:
            handler: Called with the peer's cluster id and its payload; what it returns, at most 1
                MiB, is the answer. Whatever it raises ends that request alone. It is called from a
                thread that does nothing else, one at a time: it may take its time, and use this
                instance. None: nobody answers, as at first; requests that come in the first two
                seconds of an instance wait for a handler.

        Raises:
            RuntimeError: Not initialised.
            TypeError: ``handler`` can't be called.
        """
        instance = self._check_is_inited()
        if handler is not None and not callable(handler):
            raise TypeError(f"handler must be callable, but is {type(handler).__name__}")
        instance.links.questions.set_handler(handler)

    def ask(self, remote_cluster_id: int, payload: bytes, timeout: int | None = None) -> bytes:
        """The old name of :meth:`request`; deprecated."""
        _warn_of_old_name("ask", "request")
        return self.request(remote_cluster_id, payload, timeout)

    def tell(self, remote_cluster_id: int, payload: bytes) -> None:
        """The old name of :meth:`send`; deprecated."""
        _warn_of_old_name("tell", "send")
        self.send(remote_cluster_id, payload)

    def on_question(self, handler: QuestionHandler | None) -> None:
        """The old name of :meth:`on_request`; deprecated."""
        _warn_of_old_name("on_question", "on_request")
        self.on_request(handler)

    def link(
        self,
        comm_name: str,
        cluster_rank_info: dict[int, int],
        rank_table: str,
        *,
        timeout: int | None = None,
        rendezvous: str | None = None,
        wait: bool = False,
    ) -> int:
        """Link 2 to 4 instances with each other, as a communicator (reference API, 11.4).

        All of them call this with the same arguments, in any order; none needs ``listen_ip_info``.
        Returns at once; the links are made in the background, and until
        :meth:`query_register_mem_status` says OK, transfers are LLM_NOT_YET_LINK.

        Two instances have one link, however many communicators and calls of :meth:`link_clusters`
        ask for it. It ends when the last of them on one side has ended, or with its process.

        The instances meet at the host of the lowest rank: the ``host_ip`` of its server in the rank
        table. Without that, at its ``server_id`` if that is an address, or else, with several
        servers, at the ``device_ip``, where these are addresses of that host, and else at loopback,
        where only instances on one host meet. The port follows from the name.

        Args:
            comm_name: 1 to 127 characters.
            cluster_rank_info: Cluster id -> rank of every member, in ascending order of ranks.
            rank_table: JSON of version "1.0" or "1.2" with an entry for every rank.
            timeout: Milliseconds in which all members must have come and linked. None:
                ``link_total_time`` if it is set, else 120 seconds.
            rendezvous: "ip:port" where to meet instead; all members must say the same. None: the
                environment variable ``LLM_DATADIST_RENDEZVOUS``, if it is set.
            wait: Block until the links are there, and raise what kept them from it.

        Returns:
            The id of the communicator, from 1.

        Raises:
            RuntimeError: Not initialised.
            AttributeError: ``cluster_rank_info`` is None.
            TypeError: Wrong types.
            ValueError: Ids, ranks or ``timeout`` outside their width.
            LLMParamError: A name, number or order of members that is not allowed, no such rank
                table, no such member as this, 512 communicators; with ``wait``, members that gave
                different ``cluster_rank_info``.
            LLMTimeoutError: With ``wait``: not all members came in time.
            LLMLinkError: With ``wait``: a member went away, or an address is not its host's.
            LLMFeatureNotEnabledError: The hixl backend.
        """
        return machinery.communicating.link(
            self._check_is_inited(), comm_name, cluster_rank_info, rank_table,
            timeout=timeout, rendezvous=rendezvous, wait=wait,
        )  # fmt: skip

    def unlink(self, comm_id: int, *, timeout: int | None = None) -> None:
        """End a communicator on this side; the other members do so themselves.

        Gives up what is still being linked. Links that nothing else asked for end as by
        :meth:`unlink_clusters` with ``force=True``.

        Args:
            comm_id: What :meth:`link` returned.
            timeout: Milliseconds to wait for transfers. None: ``sync_kv_timeout``.

        Raises:
            RuntimeError: Not initialised.
            TypeError, ValueError: ``comm_id`` is not a uint64, or ``timeout`` no int32.
            LLMParamError: ``timeout`` is not positive.
            LLMNotLinkedError: There is no such communicator.
            LLMException: LLM_UNLINK_FAILED: transfers of ours took longer; the communicator is
                kept, and this may be called again.
        """
        machinery.communicating.unlink(self._check_is_inited(), comm_id, timeout)

    def query_register_mem_status(self, comm_id: int) -> RegisterMemStatus:
        """How far a communicator is. Does not block.

        Args:
            comm_id: What :meth:`link` returned.

        Returns:
            PREPARING; OK when there is a link to every member; FAILED when there will be none (the
            log says why). It stays OK when a link ends later: transfers notice.

        Raises:
            RuntimeError: Not initialised.
            TypeError, ValueError: ``comm_id`` is not a uint64.
            LLMNotLinkedError: There is no such communicator.
        """
        return machinery.communicating.query_register_mem_status(self._check_is_inited(), comm_id)

    # -- helpers ----------------------------------------------------------------------------------

    def _check_is_inited(self) -> Instance:
        if self._instance is None:
            self._not_inited()
        if not self._instance.open:
            raise error_for(
                LLMStatusCode.LLM_FAILED,
                f"cluster {self._cluster_id} was initialised by the process that forked this one",
                remedy="finalize() and init() it in the process that uses it.",
            )
        return self._instance

    def _not_inited(self) -> NoReturn:
        raise RuntimeError(f"cluster {self._cluster_id} is not initialised: call init() first")

    _role_to_str: Callable[[LLMRole], str] = staticmethod(role_to_str)


def _shutdown_handler() -> None:
    """Finalize what is still live at interpreter exit; errors are logged (reference API, 6.4)."""
    for datadist in list(LLMDataDist._live):  # noqa: SLF001
        _finalize_logged(datadist)


def _finalize_logged(datadist: LLMDataDist) -> None:
    try:
        datadist.finalize()
    except LLMException:
        logger.exception("finalizing cluster %d at exit failed", datadist.cluster_id)


def _warn_of_old_name(old: str, new: str) -> None:
    """Warn the caller of a method that its name will go in the next release."""
    warnings.warn(
        f"LLMDataDist.{old} is now called {new}; the old name goes in the next release",
        DeprecationWarning,
        stacklevel=3,
    )
