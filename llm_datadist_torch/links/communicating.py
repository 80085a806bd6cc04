# SPDX-License-Identifier: Apache-2.0
"""``link``, ``unlink`` and ``query_register_mem_status``: argument checks (reference API, 11.4)."""

from __future__ import annotations

from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.links.rank_table import Member, meeting_hosts, members_of, port_of
from llm_datadist_torch.net.addresses import resolve
from llm_datadist_torch.values.checks import (
    check_dict,
    check_isinstance,
    check_timeout_ms,
    check_uint32,
    check_uint64,
    param_error,
)
from llm_datadist_torch.values.config import parse_listen_ip_info
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.enums import RegisterMemStatus
from llm_datadist_torch.values.environment import environment_text
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

MAX_NAME_LENGTH = 127
MEMBERS = range(2, 5)
RENDEZVOUS_VARIABLE = "LLM_DATADIST_RENDEZVOUS"
"""Environment variable: where the members meet, if ``link`` is not told."""
DEFAULT_TIMEOUT_MS = 120_000


def link(
    instance: Instance,
    comm_name: str,
    cluster_rank_info: dict[int, int],
    rank_table: str,
    *,
    timeout: int | None,
    rendezvous: str | None,
    wait: bool,
) -> int:
    """Begin to link with all members; see ``LLMDataDist.link``."""
    members = check_members(comm_name, cluster_rank_info, rank_table)
    check_isinstance("rendezvous", rendezvous, str)
    check_isinstance("wait", wait, bool, allow_none=False)
    timeout_ms = _default_timeout(instance) if timeout is None else check_timeout_ms(timeout)
    check_available(instance, "link")
    addresses = _addresses(comm_name, members, rank_table, rendezvous)
    comm_id = instance.communicators.start(
        comm_name, members, addresses, Deadline.after_ms(timeout_ms)
    )
    if wait:
        try:
            instance.communicators.wait(comm_id)
        except LLMException:
            instance.communicators.end(comm_id, instance.deadline())
            raise
    return comm_id


def check_members(
    comm_name: str, cluster_rank_info: dict[int, int], rank_table: str
) -> list[Member]:
    """Check the arguments that the reference has too, in its order.

    Raises:
        AttributeError: ``cluster_rank_info`` is None.
        TypeError: Wrong types.
        ValueError: Ids or ranks outside their width.
        LLMParamError: A name, a number of members or an order that is not allowed.
    """
    check_isinstance("comm_name", comm_name, str, allow_none=False)
    if not 0 < len(comm_name) <= MAX_NAME_LENGTH:
        raise param_error(
            f"comm_name has {len(comm_name)} characters, it needs 1 to {MAX_NAME_LENGTH}"
        )
    check_dict("cluster_rank_info", cluster_rank_info, int, int)
    if len(cluster_rank_info) > MEMBERS[-1]:
        raise param_error(
            f"cluster_rank_info has {len(cluster_rank_info)} members, at most {MEMBERS[-1]} are"
            " allowed"
        )
    ranks = {
        check_uint64("cluster id in cluster_rank_info", cluster_id): check_uint32(
            f"rank of cluster {cluster_id}", rank
        )
        for cluster_id, rank in cluster_rank_info.items()
    }
    check_isinstance("rank_table", rank_table, str, allow_none=False)
    if len(ranks) < MEMBERS[0]:
        raise param_error(
            f"cluster_rank_info has {len(ranks)} member(s), at least {MEMBERS[0]} are needed"
        )
    if list(ranks.values()) != sorted(ranks.values()):
        raise param_error(
            f"the ranks in cluster_rank_info are {list(ranks.values())}",
            remedy="put the members in ascending order of their ranks.",
        )
    return members_of(ranks)


def check_available(instance: Instance, operation: str) -> None:
    """Check that there are communicators.

    Raises:
        LLMFeatureNotEnabledError: The hixl backend has none (reference API, 11.6).
    """
    if instance.config.transfer_backend is not None:
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"transfer_backend={instance.config.transfer_backend!r} does not link by rank table",
            op=operation,
            remedy="use link_clusters().",
        )


def unlink(instance: Instance, comm_id: int, timeout: int | None = None) -> None:
    """End a communicator; see ``LLMDataDist.unlink``."""
    comm_id = check_uint64("comm_id", comm_id)
    timeout = None if timeout is None else check_timeout_ms(timeout)
    check_available(instance, "unlink")
    instance.communicators.end(comm_id, instance.deadline(timeout))


def query_register_mem_status(instance: Instance, comm_id: int) -> RegisterMemStatus:
    """How far a communicator is; see ``LLMDataDist.query_register_mem_status``."""
    comm_id = check_uint64("comm_id", comm_id)
    check_available(instance, "query_register_mem_status")
    return instance.communicators.status(comm_id)


def _default_timeout(instance: Instance) -> int:
    return instance.config.link_total_time * 1000 or DEFAULT_TIMEOUT_MS


def _addresses(
    comm_name: str, members: list[Member], rank_table: str, rendezvous: str | None
) -> list[tuple[str, int]]:
    """Where the members may meet, the best first."""
    source = RENDEZVOUS_VARIABLE if rendezvous is None else "rendezvous"
    text = environment_text(source) if rendezvous is None else rendezvous
    if not text:
        port = port_of(comm_name)
        return [(host, port) for host in meeting_hosts(rank_table, members)]
    host, port = parse_listen_ip_info(text, source)
    try:
        resolve(host, port)
    except ValueError as error:
        raise param_error(f"{source}={text!r}: {error}", remedy="give ip:port.") from None
    return [(host, port)]
