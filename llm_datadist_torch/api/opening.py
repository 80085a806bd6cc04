# SPDX-License-Identifier: Apache-2.0
"""``open``: the front door."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Literal, TypeAlias

from llm_datadist_torch.api import addresses, checks
from llm_datadist_torch.api.datadist import LLMDataDist
from llm_datadist_torch.api.node import Node, live_nodes
from llm_datadist_torch.api.transfer import milliseconds
from llm_datadist_torch.values.checks import check_isinstance, param_error
from llm_datadist_torch.values.config import LLMConfig
from llm_datadist_torch.values.enums import LLMRole
from llm_datadist_torch.values.open_options import ConfigLike, with_sources
from llm_datadist_torch.values.status import LLMException, error_for, message_of

RoleName: TypeAlias = Literal["prefill", "decode", "mix"]

_ROLES = {"prefill": LLMRole.PROMPT, "decode": LLMRole.DECODER, "mix": LLMRole.MIX}
_PAGE_BYTES = 1 << 16


@with_sources
def open(  # noqa: A001 (it is meant to be called as llm_datadist_torch.open)
    *,
    cluster_id: int | None = None,
    listen: str | None = None,
    role: RoleName = "mix",
    device: str = "auto",
    device_id: int = 0,
    timeout_s: float = 10.0,
    remote_accessible: bool = True,
    transport: str | None = None,
    link_secret: str | None = None,
    pool_bytes: int | None = None,
    host_pool_bytes: int | None = None,
    auto_relink: bool = True,
    orphan_policy: str = "keep",
    rdma_traffic_class: int | None = None,
    rdma_service_level: int | None = None,
    options: Mapping[str, str] | None = None,
    replace: bool = False,
    config: ConfigLike | None = None,
) -> Node:
    """Start an instance: take the pools, listen. All options are checked at once.

    Options may also come from ``config`` and from environment variables such as
    ``LLM_DATADIST_LISTEN``; keywords come first, then ``config``, then the environment.

    Args:
        cluster_id: Its name among linked peers, an unsigned 64-bit number. None: a random one.
        listen: Where peers may connect: "host:port", ":port" for all interfaces; port 0 takes any
            free one. None: nowhere; it can still connect to others.
        role: What it does in the service: "prefill", "decode" or "mix"; never affects transfers.
        device: What ``placement="device"`` means: "npu", "cpu", or "auto" for the NPU where one can
            be used.
        device_id: Index of the NPU.
        timeout_s: Seconds that a pull or push may take if it doesn't say.
        remote_accessible: Whether peers may remember where caches are, so that later pulls ask
            nobody. Linked nodes must have the same. False: pulling a request key consumes it.
        transport: The only transport to use, by name. None: the best for each link.
        link_secret: Shared by all nodes that may link; 16 random characters and more. None: what
            is in the file that ``LLM_DATADIST_LINK_SECRET_FILE`` names, if it is set.
        pool_bytes: Hard budget of device memory, taken at once. None: no pool.
        host_pool_bytes: Hard budget of host memory. None: no pool.
        auto_relink: Whether using a lost link relinks it.
        orphan_policy: Request keys that a lost peer had begun to pull: "keep", "drop", or
            "offer_again".
        rdma_traffic_class: For HIXL; None: the engine's default.
        rdma_service_level: For HIXL; None: the engine's default.
        options: Further options by the names of the reference API, such as "llm.LocalCommRes".
        replace: Close nodes of this process that have the same ``cluster_id`` or listen at the same
            port first, so that a notebook's cell may be run again.
        config: A mapping of these options, or the path of a TOML file, with them at its top or in a
            table ``llm_datadist``.

    Raises:
        TypeError: A value of a wrong type.
        ValueError: An int outside its width.
        LLMParamError: No such option, with the nearest there is; or a value that is wrong.
        LLMOutOfMemoryError: A pool can't be had.
        LLMFeatureNotEnabledError: A device or transport that is not available here; a TOML file on
            Python 3.10 without ``tomli``.
        LLMException: LLM_FAILED: ``listen`` can't be bound.
    """
    del config  # with_sources has read it
    if timeout_s is None:
        raise TypeError("timeout_s must be seconds, but is None")
    place = None if listen is None else addresses.listen_address(listen)
    settings = LLMConfig()
    settings.enable_cache_manager = True
    settings.enable_remote_cache_accessible = remote_accessible
    settings.device = device
    settings.device_id = device_id
    settings.sync_kv_timeout = milliseconds(timeout_s)
    settings.auto_relink = auto_relink
    settings.orphan_policy = orphan_policy
    settings.mem_pool_cfg = _pool("pool_bytes", pool_bytes)
    settings.host_mem_pool_cfg = _pool("host_pool_bytes", host_pool_bytes)
    settings.transport = transport
    settings.link_secret = link_secret
    if place is not None:
        settings.listen_ip_info = addresses.format_address(*place)
    if rdma_traffic_class is not None:
        settings.rdma_traffic_class = rdma_traffic_class
    if rdma_service_level is not None:
        settings.rdma_service_level = rdma_service_level
    settings.ge_options = {} if options is None else dict(options)
    chosen = 1 + secrets.randbits(48) if cluster_id is None else cluster_id
    datadist = LLMDataDist(checks.choice("role", role, _ROLES), chosen)
    check_isinstance("replace", replace, bool, allow_none=False)
    if replace:
        _close_equals(cluster_id, place)
    try:
        datadist.init(settings.generate_options())
    except LLMException as error:
        raise _explained(error, place) from None
    return Node(datadist, owns=True)


def _pool(name: str, nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    check_isinstance(name, nbytes, int, allow_none=False)
    if nbytes < _PAGE_BYTES:
        raise param_error(f"{name}={nbytes} is less than one page of {_PAGE_BYTES} bytes")
    return json.dumps({"memory_size": nbytes})


def _same_port(node: Node, place: tuple[str, int] | None) -> bool:
    mine = node.datadist.listen_address
    return bool(mine is not None and place is not None and place[1] and mine[1] == place[1])


def _close_equals(cluster_id: int | None, place: tuple[str, int] | None) -> None:
    for node in list(live_nodes):
        if not node.closed and (node.cluster_id == cluster_id or _same_port(node, place)):
            node.close()


def _explained(error: LLMException, place: tuple[str, int] | None) -> LLMException:
    """The error of a port that is taken, where a node of this process has it."""
    for node in list(live_nodes):
        if not node.closed and _same_port(node, place):
            return error_for(
                error.status_code,
                f"{message_of(error)}: {node!r} of this process has that port",
                op="open",
                remedy="close() that node, or give replace=True.",
            )
    return error
