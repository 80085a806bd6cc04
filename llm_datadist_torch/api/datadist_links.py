# SPDX-License-Identifier: Apache-2.0
"""The calls of ``LLMDataDist`` that make, show and end links."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

from llm_datadist_torch.links import asking, communicating, linking
from llm_datadist_torch.links.events import LinkCallback, LinkListener
from llm_datadist_torch.links.info import LinkInfo
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.links.linking import LinkResult
from llm_datadist_torch.links.questions import QuestionHandler
from llm_datadist_torch.values.checks import check_isinstance, check_timeout_ms, check_uint16
from llm_datadist_torch.values.cluster_info import LLMClusterInfo
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.enums import RegisterMemStatus


class LinkCalls(ABC):
    """What ``LLMDataDist`` offers on links."""

    _options: dict[str, str]

    @abstractmethod
    def _check_is_inited(self) -> Instance: ...

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
        linking.check_clusters(clusters, need_local=need_local)
        return linking.link_clusters(
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
        linking.check_clusters(clusters, need_local=False)
        return linking.unlink_clusters(instance, clusters, Deadline.after_ms(timeout), force=force)

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
            ValueError: ``port`` is no uint16, or ``timeout`` no int32.
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
        return [LinkInfo.of(link) for link in self._check_is_inited().links.links()]

    def on_link_event(self, callback: LinkCallback) -> LinkListener:
        """Be told when links are made, lost, made anew and ended (not in the reference).

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
        in order; pulls and pushes don't wait for them. A lost link is made anew, as by a pull. Not
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
        return asking.request(self._check_is_inited(), remote_cluster_id, payload, timeout)

    def send(self, remote_cluster_id: int, payload: bytes) -> None:
        """Send the program of a linked peer something, without waiting for what it answers.

        The peer's handler gets it as a request (:meth:`request`), in order with those; its answer,
        or error, goes nowhere. It may be lost with the link. Blocks to make a lost link anew, and
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
        asking.send(self._check_is_inited(), remote_cluster_id, payload)

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
        ask for it. It ends when one side has let go of its last, or with its process.

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
        return communicating.link(
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
            TypeError, ValueError: ``comm_id`` is no uint64, or ``timeout`` no int32.
            LLMParamError: ``timeout`` is not positive.
            LLMNotLinkedError: There is no such communicator.
            LLMException: LLM_UNLINK_FAILED: transfers of ours took longer; the communicator is
                kept, and this may be called again.
        """
        communicating.unlink(self._check_is_inited(), comm_id, timeout)

    def query_register_mem_status(self, comm_id: int) -> RegisterMemStatus:
        """How far a communicator is. Does not block.

        Args:
            comm_id: What :meth:`link` returned.

        Returns:
            PREPARING; OK when there is a link to every member; FAILED when there will be none (the
            log says why). It stays OK when a link ends later: transfers notice.

        Raises:
            RuntimeError: Not initialised.
            TypeError, ValueError: ``comm_id`` is no uint64.
            LLMNotLinkedError: There is no such communicator.
        """
        return communicating.query_register_mem_status(self._check_is_inited(), comm_id)


def _warn_of_old_name(old: str, new: str) -> None:
    """Warn the caller of a method that its name will go in the next release."""
    warnings.warn(
        f"LLMDataDist.{old} is now called {new}; the old name goes in the next release",
        DeprecationWarning,
        stacklevel=3,
    )
