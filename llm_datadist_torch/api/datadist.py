# SPDX-License-Identifier: Apache-2.0
"""``LLMDataDist``: one instance, its life and its links."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from llm_datadist_torch.api import statistics
from llm_datadist_torch.api.cache_manager import CacheManager
from llm_datadist_torch.api.datadist_links import LinkCalls
from llm_datadist_torch.links import linking
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.observe import html, metrics, tracing
from llm_datadist_torch.observe.stats import Stats
from llm_datadist_torch.values.checks import (
    check_isinstance,
    check_timeout_ms,
    check_uint64,
    param_error,
)
from llm_datadist_torch.values.config import EngineConfig, role_to_str
from llm_datadist_torch.values.enums import LLMRole
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

logger = logging.getLogger("llm_datadist_torch")


class LLMDataDist(LinkCalls):
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
        self._manager: CacheManager | None = None
        self._life = threading.Lock()

    def init(self, options: dict[str, str]) -> None:
        """Start the instance: take the pools, listen (reference API, 6.2).

        Does nothing if it is initialised already.

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
        with self._life:
            if self._instance is not None:
                return
            config = EngineConfig.from_options(self._role, options)
            instance = Instance(self._cluster_id, config)
            instance.links.questions.answer_stats_by(
                lambda: statistics.look(instance).to_json().encode()
            )
            self._options = dict(options)
            self._manager = CacheManager(instance)
            self._instance = instance
            LLMDataDist._live.add(self)
            LLMDataDist.llm_engine_instance = self
            if not LLMDataDist._exit_registered:
                LLMDataDist._exit_registered = True
                atexit.register(_shutdown_handler)

    def finalize(self, *, timeout: int | None = None) -> None:
        """End all links and caches, release the pools, stop listening (reference API, 6.4).

        Waits for transfers that are under way, on either side, and cuts off those that take longer;
        idempotent.

        Tensors that the user still holds stay valid. The instance may be initialised again.

        Args:
            timeout: Milliseconds to wait for transfers at most. None: ``sync_kv_timeout``.

        Raises:
            TypeError, ValueError: ``timeout`` is no int32.
            LLMParamError: It is not positive. Nothing has been ended.
        """
        timeout = None if timeout is None else check_timeout_ms(timeout)
        with self._life:
            instance, self._instance, self._manager = self._instance, None, None
            if instance is None:
                return
            LLMDataDist._live.discard(self)
            if LLMDataDist.llm_engine_instance is self:
                LLMDataDist.llm_engine_instance = next(iter(LLMDataDist._live), None)
            instance.close(timeout)

    def __enter__(self) -> Self:
        """The instance itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Finalize."""
        self.finalize()

    def __repr__(self) -> str:
        """Who it is and whether it is initialised."""
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
        return statistics.look(self._check_is_inited())

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
            return statistics.look(instance) if instance.open else None

        return metrics.export(look, registry)

    def trace_transfers(self, tracer_provider: Any = None) -> None:  # noqa: ANN401
        """Make an OpenTelemetry span of each transfer from now on. Not in the reference.

        Args:
            tracer_provider: None: OpenTelemetry's global one.

        Raises:
            RuntimeError: Not initialised.
            LLMFeatureNotEnabledError: ``opentelemetry-api`` is not installed.
        """
        instance = self._check_is_inited()
        listener = tracing.span_listener(instance.cluster_id, tracer_provider)
        instance.transfers.listen(listener)

    def _repr_html_(self) -> str:
        """What notebooks show: memory, links and the latest transfers."""
        title = f"LLMDataDist {self._cluster_id} ({self._role!s})"
        if self._instance is None:
            return html.facts_html(title, [("state", "not initialised")])
        return html.stats_html(title, self.stats())

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
            LLMParamError: A listen address that is none.
            LLMLinkError: LLM_EXIST_LINK: there are links.
            LLMException: LLM_FAILED: the address can't be bound. Whatever is raised, role and
                listener are as they were.
        """
        self._check_is_inited()
        listen = linking.check_role_switch(role, switch_options)
        with self._life:
            linking.relisten(self._check_is_inited(), listen)
            self._role = role

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
