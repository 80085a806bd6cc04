# SPDX-License-Identifier: Apache-2.0
"""From option texts to a typed EngineConfig."""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from llm_datadist_torch.values.checks import (
    INT32_MAX,
    UINT16_MAX,
    UINT32_MAX,
    check_dict,
    param_error,
)
from llm_datadist_torch.values.cluster_info import trans_str_ip
from llm_datadist_torch.values.enums import LLMRole
from llm_datadist_torch.values.llm_config import (
    DEVICES,
    KEEP,
    LLM_CONFIG_KEYS,
    LONGEST_HEARTBEAT_MS,
    LLMConfig,
    LlmConfig,
    check_device_text,
    check_heartbeat,
    check_orphan_policy,
)
from llm_datadist_torch.values.secret import check_link_secret, secret_from_file
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

__all__ = [
    "EngineConfig",
    "LLMConfig",
    "LlmConfig",
    "PoolConfig",
    "parse_listen_ip_info",
    "role_to_str",
    "trans_str_ip",
]

_FLOW_GRAPH_MEM = "ge.flowGraphMemMaxSize"
_CACHE_MANAGER = "llm.EnableCacheManager"
_REMOTE_ACCESSIBLE = "llm.EnableRemoteCacheAccessible"
LISTEN_KEY = "llm.listenIpInfo"
"""Option key of the address to listen on."""
_LOCAL_COMM_RES = "llm.LocalCommRes"
_BACKEND = "llm.TransferBackend"
_DEVICE = "llm.Device"
_TRANSPORT = "llm.Transport"
_HEARTBEAT = "llm.HeartbeatInterval"
_AUTO_RELINK = "llm.AutoRelink"
_ALLOW_PTRACE = "llm.AllowPtrace"
_ORPHANS = "llm.OrphanPolicy"
_SECRET = "llm.LinkSecret"  # noqa: S105
_DEVICE_POOL = "llm.MemPoolConfig"
_HOST_POOL = "llm.HostMemPoolConfig"
# llm.Role is what init itself would add: it may come back in a dict that was used before.
_KNOWN_KEYS = LLM_CONFIG_KEYS | {_FLOW_GRAPH_MEM, "llm.Role"}

_ROLE_TEXTS = {LLMRole.PROMPT: "Prompt", LLMRole.DECODER: "Decoder", LLMRole.MIX: "Mix"}
_SET_CACHE_MANAGER = "set LLMConfig.enable_cache_manager = True"

_warned_keys: set[str] = set()
_warned_lock = threading.Lock()


def role_to_str(role: LLMRole) -> str:
    """Returns the role's option text: "Prompt", "Decoder" or "Mix".

    Raises:
        KeyError: not a role (None, for instance).
    """
    return _ROLE_TEXTS[role]


def parse_listen_ip_info(text: str, name: str = LISTEN_KEY) -> tuple[str, int]:
    """Parses "ip:port", or "[ipv6]:port" (not in the reference).

    Args:
        text: what to parse.
        name: where it comes from, for the message.

    Returns:
        The host as text, which only binding will judge, and the port; 0 means any free port.

    Raises:
        LLMParamError: not of that form, or a port that is not a uint16 (it is a ValueError too).
    """
    host, separator, port_text = text.rpartition(":")
    if ":" in host and host[0] == "[" and host[-1] == "]":
        host = host[1:-1]
    elif ":" in host or not separator:
        raise param_error(
            f"{name}={text!r} is not of the form ip:port.", remedy="write IPv6 as [ip]:port"
        )
    try:
        port = int(port_text)
    except ValueError:
        raise param_error(f"{name}={text!r}: port {port_text!r} is not a number.") from None
    if not 0 <= port <= UINT16_MAX:
        raise param_error(f"{name}={text!r}: the port is out of range [0, {UINT16_MAX}].")
    return host, port


@dataclass(frozen=True)
class PoolConfig:
    """One memory pool: `memory_size` bytes in pages of `1 << page_shift` bytes."""

    memory_size: int
    page_shift: int = 16

    @classmethod
    def from_json(cls, key: str, text: str) -> PoolConfig:
        """Parses a pool option, such as `{"memory_size": 1048576, "page_shift": 16}`.

        Args:
            key: option key, for the message.
            text: the JSON text.

        Raises:
            LLMParamError: no JSON object, a wrong or missing member, a page shift outside
                [10, 31), a page larger than the pool, or 2^32-1 pages and more.
            LLMOutOfMemoryError: a device pool of 0 bytes, as in the reference.
        """
        try:
            members = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _pool_error(key, f"is not JSON: {error}") from None
        if not isinstance(members, dict):
            raise _pool_error(key, f"must be a JSON object, but is a {type(members).__name__}")
        if "memory_size" not in members:
            raise _pool_error(key, "has no memory_size")
        memory_size = members["memory_size"]
        page_shift = members.get("page_shift", 16)
        for name, value in (("memory_size", memory_size), ("page_shift", page_shift)):
            # type(), because JSON's true is an int to isinstance.
            if type(value) is not int or value < 0:
                raise _pool_error(key, f"{name} must be an unsigned integer, but is {value!r}")
        if not 10 <= page_shift < 31:
            raise _pool_error(key, f"page_shift={page_shift} is out of range [10, 31)")
        if memory_size == 0 and key == _DEVICE_POOL:
            # The reference takes the memory before it looks at the pages.
            raise error_for(
                LLMStatusCode.LLM_OUT_OF_MEMORY,
                f"{key}: a pool of memory_size=0 cannot be had.",
                remedy="give a larger memory_size, or no pool at all",
            )
        if memory_size < 1 << page_shift:
            raise _pool_error(
                key, f"memory_size={memory_size} is less than one page of {1 << page_shift} bytes"
            )
        if memory_size >> page_shift >= UINT32_MAX:
            raise _pool_error(
                key, f"memory_size={memory_size} has too many pages of {1 << page_shift} bytes"
            )
        return cls(memory_size, page_shift)


def _pool_error(key: str, fault: str) -> LLMException:
    return param_error(
        f"{key}: {fault}.", remedy='write e.g. {"memory_size": 104857600, "page_shift": 16}'
    )


@dataclass(frozen=True)
class EngineConfig:
    """What an instance was told at `init`, typed and checked.

    Attributes:
        role: role of the instance.
        device_id: index of the device.
        device: what DEVICE caches are on: "npu", "cpu", or "auto".
        listen: host text and port to listen on, None for no listener; port 0 means any.
        sync_timeout_ms: how long a pull or push may take.
        device_pool: pool for DEVICE caches, None for none.
        host_pool: pool for HOST caches, None for none.
        remote_accessible: whether peers may keep a copy of the cache table.
        local_comm_res: description of local resources; "" differs from None.
        transfer_backend: None for the default, or "hixl".
        transport: name of the only transport to use, None for the best of what is available.
        global_resource_config: text for the transfer engine, as it is.
        rdma_traffic_class: uint32, None for the engine's default.
        rdma_service_level: uint32, None for the engine's default.
        link_total_time: seconds.
        link_retry_count: attempts, from 1.
        auto_relink: whether using a lost link relinks it.
        allow_ptrace: whether Yama is told to let processes of the same user reach this one.
        orphan_policy: one of `ORPHAN_POLICIES`.
        link_secret: what all peers must know, None where links are open.
    """

    role: LLMRole
    device_id: int = 0
    device: str = DEVICES[0]
    listen: tuple[str, int] | None = None
    sync_timeout_ms: int = 1000
    device_pool: PoolConfig | None = None
    host_pool: PoolConfig | None = None
    remote_accessible: bool = False
    local_comm_res: str | None = None
    transfer_backend: str | None = None
    transport: str | None = None
    global_resource_config: str | None = None
    rdma_traffic_class: int | None = None
    rdma_service_level: int | None = None
    link_total_time: int = 0
    link_retry_count: int = 1
    auto_relink: bool = True
    allow_ptrace: bool = False
    orphan_policy: str = KEEP
    link_secret: str | None = field(default=None, repr=False)

    @classmethod
    def from_options(cls, role: LLMRole, options: dict[str, str]) -> EngineConfig:
        """Checks the options of `LLMDataDist.init` in the reference's order, and types them.

        The dict is not changed. A key that nothing here knows is warned of, once per process.

        Args:
            role: role of the instance.
            options: as `LLMConfig.generate_options` makes them.

        Raises:
            AttributeError: `options` is None.
            TypeError: `options` is not a dict, or a key or value is not a str.
            KeyError: `role` is not a role.
            LLMParamError: an option is wrong, or options contradict each other.
        """
        check_dict("options", options, str, str)
        _check_flow_graph_mem(options)
        role_to_str(role)
        settled = dict(options)
        _settle_mode(settled)
        listen = parse_listen_ip_info(settled[LISTEN_KEY]) if LISTEN_KEY in settled else None
        remote_accessible = _flag(settled, _REMOTE_ACCESSIBLE)
        device_id = _number(settled, "ge.exec.deviceId", 0, INT32_MAX)
        sync_timeout_ms = _number(settled, "llm.SyncKvCacheWaitTime", 1, INT32_MAX)
        link_total_time = _number(settled, "llm.LinkTotalTime", 0, INT32_MAX)
        link_retry_count = _number(settled, "llm.LinkRetryCount", 1, 100)
        backend, transport = _transports(settled)
        _check_heartbeat(settled)
        config = cls(
            role=role,
            device_id=0 if device_id is None else device_id,
            device=check_device_text(_DEVICE, settled.get(_DEVICE, DEVICES[0])),
            listen=listen,
            sync_timeout_ms=1000 if sync_timeout_ms is None else sync_timeout_ms,
            device_pool=_pool(settled, _DEVICE_POOL),
            host_pool=_pool(settled, _HOST_POOL),
            remote_accessible=remote_accessible,
            local_comm_res=settled.get(_LOCAL_COMM_RES),
            transfer_backend=backend,
            transport=transport,
            global_resource_config=settled.get("llm.GlobalResourceConfig"),
            rdma_traffic_class=_number(settled, "llm.RdmaTrafficClass", 0, UINT32_MAX),
            rdma_service_level=_number(settled, "llm.RdmaServiceLevel", 0, UINT32_MAX),
            link_total_time=0 if link_total_time is None else link_total_time,
            link_retry_count=1 if link_retry_count is None else link_retry_count,
            auto_relink=_flag(settled, _AUTO_RELINK, default="1"),
            allow_ptrace=_flag(settled, _ALLOW_PTRACE),
            orphan_policy=check_orphan_policy(_ORPHANS, settled.get(_ORPHANS, KEEP)),
            link_secret=_secret(settled),
        )
        _warn_of_unknown(options)
        return config


def _check_heartbeat(options: Mapping[str, str]) -> None:
    """The option is of no use any more, but a bad one is refused."""
    heartbeat_ms = _number(options, _HEARTBEAT, 0, LONGEST_HEARTBEAT_MS)
    if heartbeat_ms is not None:
        check_heartbeat(_HEARTBEAT, heartbeat_ms)
        warnings.warn(
            f"{_HEARTBEAT} (LLMConfig.heartbeat_interval) is ignored and will be removed: the"
            " kernel tells when a peer is gone",
            DeprecationWarning,
            stacklevel=4,
        )


def _check_flow_graph_mem(options: Mapping[str, str]) -> None:
    """Step 4 of init (6.2): the option is of no use here, but a bad one is refused."""
    value = options.get(_FLOW_GRAPH_MEM)
    if value is not None and not _is_digits(value):
        raise param_error(f"{_FLOW_GRAPH_MEM}={value!r} must be one number.")


def _settle_mode(options: dict[str, str]) -> None:
    """Steps 6 to 10 of init (6.2) without the listen address; fills in what follows."""
    if _LOCAL_COMM_RES in options:
        options.setdefault(_CACHE_MANAGER, "1")
        options.setdefault(_REMOTE_ACCESSIBLE, "1")
    mode_on = options.get(_CACHE_MANAGER) == "1"
    if _LOCAL_COMM_RES in options and not mode_on:
        raise param_error(f"{_LOCAL_COMM_RES} needs {_CACHE_MANAGER}=1.", remedy=_SET_CACHE_MANAGER)
    if _BACKEND in options:
        if not mode_on:
            raise param_error(f"{_BACKEND} needs {_CACHE_MANAGER}=1.", remedy=_SET_CACHE_MANAGER)
        if options.setdefault(_REMOTE_ACCESSIBLE, "1") != "1":
            raise param_error(
                f"{_BACKEND} needs {_REMOTE_ACCESSIBLE}=1.",
                remedy="set LLMConfig.enable_remote_cache_accessible = True",
            )
        if LISTEN_KEY not in options:
            raise param_error(
                f"{_BACKEND} needs {LISTEN_KEY}.", remedy='set LLMConfig.listen_ip_info = "ip:port"'
            )
    if not mode_on:
        raise param_error(
            f"{_CACHE_MANAGER} is {options.get(_CACHE_MANAGER)!r}, but there is only the "
            "cache-manager mode here.",
            remedy=_SET_CACHE_MANAGER,
        )


def _transports(options: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The reference's transfer backend, and the one transport to use: a backend is one, too."""
    backend, transport = options.get(_BACKEND), options.get(_TRANSPORT)
    if backend not in (None, "hixl"):
        raise param_error(
            f"{_BACKEND}={backend!r} is not a transfer backend.",
            remedy='use "hixl", or leave LLMConfig.transfer_backend unset',
        )
    if backend is not None and transport not in (None, backend):
        raise param_error(
            f"{_BACKEND}={backend!r} and {_TRANSPORT}={transport!r} contradict each other.",
            remedy="leave one of LLMConfig.transfer_backend and LLMConfig.transport unset",
        )
    return backend, backend if transport is None else transport


def _is_digits(text: str) -> bool:
    # isdigit() alone takes superscripts, which int() does not.
    return text.isascii() and text.isdigit()


def _flag(options: Mapping[str, str], key: str, default: str = "0") -> bool:
    value = options.get(key, default)
    if value not in ("0", "1"):
        raise param_error(f'{key}={value!r} must be "0" or "1".')
    return value == "1"


def _number(options: Mapping[str, str], key: str, low: int, high: int) -> int | None:
    text = options.get(key)
    if text is None:
        return None
    # Ten digits hold every number allowed here, and int() refuses absurdly long ones.
    digits = text.lstrip("0") or "0"
    if not _is_digits(text) or len(digits) > 10 or not low <= int(digits) <= high:
        raise param_error(f"{key}={text!r} must be one number in [{low}, {high}].")
    return int(digits)


def _pool(options: Mapping[str, str], key: str) -> PoolConfig | None:
    return PoolConfig.from_json(key, options[key]) if key in options else None


def _secret(options: Mapping[str, str]) -> str | None:
    if _SECRET not in options:
        return secret_from_file()
    return check_link_secret(_SECRET, options[_SECRET])


def _warn_of_unknown(options: Mapping[str, str]) -> None:
    for key in options.keys() - _KNOWN_KEYS:
        with _warned_lock:
            if key in _warned_keys:
                continue
            _warned_keys.add(key)
        meant = [known for known in _KNOWN_KEYS if known.lower() == key.lower()]
        hint = f" Did you mean {meant[0]}?" if meant else ""
        # Nobody writes further lines into the log by the name of an option.
        shown = key if key.isprintable() else ascii(key)
        logging.getLogger("llm_datadist_torch").warning("Option %s is ignored.%s", shown, hint)
