# SPDX-License-Identifier: Apache-2.0
"""``link_clusters``, ``unlink_clusters`` and ``switch_role``.

Argument checks and status codes (reference API, 11.1 to 11.3).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.serving.peer import LinkState
from llm_datadist_torch.values.checks import check_isinstance, check_uint64, param_error
from llm_datadist_torch.values.cluster_info import LLMClusterInfo, entry_to_host
from llm_datadist_torch.values.config import LISTEN_KEY, parse_listen_ip_info, role_to_str
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.enums import LLMRole
from llm_datadist_torch.values.status import (
    LLMException,
    LLMPeerLostError,
    LLMStatusCode,
    error_for,
)

logger = logging.getLogger("llm_datadist_torch")

LinkResult = tuple[LLMStatusCode, list[LLMStatusCode]]


def check_clusters(clusters: Sequence[LLMClusterInfo], *, need_local: bool) -> None:
    """Check the ``clusters`` argument.

    Raises:
        TypeError: No list or tuple of LLMClusterInfo, or one without ``remote_cluster_id``.
        LLMParamError: One without local ip info.
    """
    check_isinstance("clusters", clusters, (list, tuple), LLMClusterInfo, allow_none=False)
    for at, cluster in enumerate(clusters):
        if need_local and not cluster.local_ip_info_list:
            raise param_error(
                f"clusters[{at}]: local_ip_info_list is empty",
                remedy="call append_local_ip_info().",
            )
        check_uint64(f"clusters[{at}].remote_cluster_id", _id_of(cluster))


def link_clusters(
    instance: Instance, clusters: Sequence[LLMClusterInfo], deadline: Deadline, *, need_local: bool
) -> LinkResult:
    """Link to all clusters at once. The arguments have been checked."""
    targets: list[tuple[int, str, int] | LLMStatusCode] = []
    for cluster in clusters:
        if len(cluster.remote_ip_info_list) != 1 or (
            need_local and len(cluster.local_ip_info_list) != 1
        ):
            logger.warning(
                "cluster %s: exactly one remote and one local ip info are needed", cluster
            )
            targets.append(LLMStatusCode.LLM_PARAM_INVALID)
            continue
        peer, (ip, port) = _id_of(cluster), cluster.remote_ip_info_list[0]
        status = _status_with_a_backend(instance, peer, (ip, port))
        targets.append((peer, entry_to_host(ip), port) if status is None else status)
    return _overall(instance.links.link_all(targets, deadline))


def unlink_clusters(
    instance: Instance, clusters: Sequence[LLMClusterInfo], deadline: Deadline, *, force: bool
) -> LinkResult:
    """Unlink cluster by cluster. The arguments have been checked."""
    # With a transfer backend unlinking is local in the reference, and ``force`` means nothing.
    if force or instance.config.transfer_backend is not None:
        return _overall([_unlink_here(instance, cluster, deadline) for cluster in clusters])
    return _overall([_unlink(instance, cluster, deadline) for cluster in clusters])


def check_role_switch(
    role: LLMRole, switch_options: dict[str, str] | None
) -> tuple[str, int] | None:
    """Check the arguments of ``switch_role``.

    Returns:
        Where to listen from now on, or None.

    Raises:
        TypeError: Wrong types.
        KeyError: ``role`` is None, as in the reference.
        LLMParamError: Not a listen address.
    """
    check_isinstance("role", role, LLMRole)
    role_to_str(role)
    check_isinstance("switch_options", switch_options, dict)
    if not switch_options or LISTEN_KEY not in switch_options:
        return None
    text = switch_options[LISTEN_KEY]
    check_isinstance(f"switch_options[{LISTEN_KEY!r}]", text, str, allow_none=False)
    return parse_listen_ip_info(text)


def relisten(instance: Instance, listen: tuple[str, int] | None) -> None:
    """Listen elsewhere, or not at all. The arguments have been checked.

    Raises:
        LLMLinkError: There are links (LLM_EXIST_LINK).
        LLMParamError: The host is not an address.
        LLMException: LLM_FAILED, the address can't be bound. It listens where it did before.
    """

    def check_no_links() -> None:
        peers = [link.peer for link in instance.links.links() if link.state is LinkState.LINKED]
        if peers:
            raise error_for(
                LLMStatusCode.LLM_EXIST_LINK,
                f"{len(peers)} peer(s) are linked, cluster {peers[0]} for one",
                op="switch_role",
                peer=peers[0],
            )
        if instance.communicators.preparing:
            raise error_for(
                LLMStatusCode.LLM_EXIST_LINK,
                "a communicator is being linked",
                op="switch_role",
                remedy="wait until query_register_mem_status() says OK, and unlink() it.",
            )

    try:
        instance.links.endpoint.relisten(listen, check_no_links)
    except LLMException:
        raise
    except ValueError as error:
        raise param_error(f"{LISTEN_KEY}: {error}", remedy="give ip:port.") from error
    except OSError as error:
        raise error_for(LLMStatusCode.LLM_FAILED, str(error), op="switch_role") from error


def _status_with_a_backend(
    instance: Instance, peer: int, address: tuple[int | str, int]
) -> LLMStatusCode | None:
    """What asking for a link comes to at once with the reference's transfer backend, or None.

    There a link has one direction, and each side asks for its own (reference API, 11.6). Here one
    link has both, so the second side only joins in.
    """
    if instance.config.transfer_backend is None:
        return None
    if peer == instance.cluster_id:
        logger.warning("cluster %d is this instance itself", peer)
        return LLMStatusCode.LLM_PARAM_INVALID
    link = instance.links.registry.linked(peer)
    if link is None or link.dialed:
        return None
    link.dialed = True
    link.address = entry_to_host(address[0]), address[1]
    return LLMStatusCode.LLM_SUCCESS


def _unlink_here(instance: Instance, cluster: LLMClusterInfo, deadline: Deadline) -> LLMStatusCode:
    try:
        instance.links.unlink_here(_id_of(cluster), deadline)
    except LLMException as error:
        logger.warning("unlinking failed: %s", error)
        return error.status_code
    return LLMStatusCode.LLM_SUCCESS


def _unlink(instance: Instance, cluster: LLMClusterInfo, deadline: Deadline) -> LLMStatusCode:
    peer = _id_of(cluster)
    if len(cluster.remote_ip_info_list) != 1:
        logger.warning(
            "cluster %s: unlinking without force needs exactly one remote ip info", cluster
        )
        return LLMStatusCode.LLM_PARAM_INVALID
    states = {link.peer: link.state for link in instance.links.links()}
    try:
        if states.get(peer) is LinkState.LINKED:
            instance.links.unlink(peer, deadline)
            return LLMStatusCode.LLM_SUCCESS
    except LLMPeerLostError as error:
        logger.warning("unlinking cluster %d failed: %s", peer, error)
        return LLMStatusCode.LLM_UNLINK_FAILED
    except LLMException as error:
        logger.warning("unlinking cluster %d failed: %s", peer, error)
        return error.status_code
    status = _reachable(cluster, deadline)
    if status == LLMStatusCode.LLM_SUCCESS:
        instance.links.unlink_here(peer, deadline)
    return status


def _reachable(cluster: LLMClusterInfo, deadline: Deadline) -> LLMStatusCode:
    """Without a live link, the only thing left to agree on with a peer is that it is there."""
    ip, port = cluster.remote_ip_info_list[0]
    try:
        socket.create_connection(
            (entry_to_host(ip), port), timeout=deadline.remaining_s() or 1e-3
        ).close()
    except TimeoutError:
        return LLMStatusCode.LLM_TIMEOUT
    except OSError as error:
        logger.warning("cluster %d can't be reached: %s", _id_of(cluster), error)
        return LLMStatusCode.LLM_UNLINK_FAILED
    return LLMStatusCode.LLM_SUCCESS


def _id_of(cluster: LLMClusterInfo) -> int:
    # None is refused by check_clusters, with the type error that the reference has.
    return cluster.remote_cluster_id  # type: ignore[return-value]


def _overall(results: list[LLMStatusCode]) -> LinkResult:
    if not results:
        return LLMStatusCode.LLM_PARAM_INVALID, []
    failed = [status for status in results if status != LLMStatusCode.LLM_SUCCESS]
    return (failed[-1] if failed else LLMStatusCode.LLM_SUCCESS), results
