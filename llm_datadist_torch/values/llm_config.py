# SPDX-License-Identifier: Apache-2.0
"""LLMConfig: properties that check themselves, and the dict of option texts made of them."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from llm_datadist_torch.values.checks import (
    INT32_MAX,
    check_dict,
    check_int32,
    check_isinstance,
    check_uint32,
    param_error,
    shown,
)
from llm_datadist_torch.values.cluster_info import trans_str_ip
from llm_datadist_torch.values.secret import check_secret_value

logger = logging.getLogger("llm_datadist_torch")

_T = TypeVar("_T")
_Check = Callable[[str, Any], Any]
_ToText = Callable[[Any], "str | None"]


DEVICES = ("auto", "npu", "cpu")
"""What the option of the device may be; the first is the default."""


KEEP, DROP, OFFER_AGAIN = ORPHAN_POLICIES = ("keep", "drop", "offer_again")
"""What happens to a request key that a peer had begun to pull when the link to it is lost.

The key stays, with what was fetched of it counted; or it goes; or it stays, and all of it has to be
pulled again before it is consumed. The first is the default.
"""
HEARTBEAT_MS, SHORTEST_HEARTBEAT_MS, LONGEST_HEARTBEAT_MS = 1000, 20, 3_600_000


def check_orphan_policy(name: str, text: str) -> str:
    """Returns the text of an orphan policy.

    Raises:
        LLMParamError: it is none of `ORPHAN_POLICIES`.
    """
    if text not in ORPHAN_POLICIES:
        raise param_error(f"{name}={text!r} must be one of {', '.join(ORPHAN_POLICIES)}.")
    return text


def check_heartbeat(name: str, value: int) -> int:
    """Returns a heartbeat interval.

    Raises:
        LLMParamError: it is neither 0 nor of a sensible length.
    """
    if value != 0 and not SHORTEST_HEARTBEAT_MS <= value <= LONGEST_HEARTBEAT_MS:
        raise param_error(
            f"{name}={shown(value)} is out of range [{SHORTEST_HEARTBEAT_MS},"
            f" {LONGEST_HEARTBEAT_MS}].",
            remedy="give milliseconds, or 0 for no heartbeats",
        )
    return value


def check_device_text(name: str, text: str) -> str:
    """Returns the text of a device option.

    Raises:
        LLMParamError: it is none of `DEVICES`.
    """
    if text not in DEVICES:
        raise param_error(f"{name}={text!r} must be one of {', '.join(DEVICES)}.")
    return text


class _Option(Generic[_T]):
    """A property of LLMConfig that knows its check and its option (reference API, 4).

    Args:
        key: option key; "" for a property without one.
        default: what the getter gives while the property is unset.
        check: called with name and new value; returns what to keep, or raises.
        to_text: option text of a kept value, None for no option. It sees only what was set.
        none_unsets: whether assigning None unsets the property, instead of keeping None.
        doc: docstring of the property.
    """

    def __init__(
        self,
        key: str,
        default: _T,
        check: _Check,
        to_text: _ToText,
        doc: str,
        *,
        none_unsets: bool = False,
    ) -> None:
        self.key = key
        self.default = default
        self.check = check
        self.to_text = to_text
        self.none_unsets = none_unsets
        self.__doc__ = doc
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, config: None, owner: type) -> _Option[_T]: ...

    @overload
    def __get__(self, config: object, owner: type) -> _T: ...

    def __get__(self, config: object | None, owner: type) -> _Option[_T] | _T:
        if config is None:
            return self
        kept: _T = config.__dict__.get(f"_{self.name}", self.default)
        return kept

    def __set__(self, config: object, value: _T | None) -> None:
        kept = self.check(self.name, value)
        if kept is None and self.none_unsets:
            config.__dict__.pop(f"_{self.name}", None)
        else:
            config.__dict__[f"_{self.name}"] = kept

    def option_text(self, config: object) -> str | None:
        """Text of the option, None where it is not to be given."""
        slot = f"_{self.name}"
        return self.to_text(config.__dict__[slot]) if slot in config.__dict__ else None


def _check_text(name: str, value: str | None) -> str | None:
    return check_isinstance(name, value, str)


def _text_if_any(key: str, doc: str) -> _Option[str | None]:
    """A text that is an option unless it is empty; None is kept."""
    return _Option[str | None](key, "", _check_text, lambda value: value or None, doc)


def _text_even_empty(key: str, doc: str) -> _Option[str]:
    """A text that is an option as soon as it is set, even if empty; None unsets it."""
    return _Option[str](key, "", _check_text, lambda value: value, doc, none_unsets=True)


def _flag(key: str, doc: str, *, default: bool = False) -> _Option[bool]:
    return _Option[bool](
        key,
        default,
        lambda name, value: check_isinstance(name, value, bool),
        lambda value: "1" if value else "0",
        doc,
        none_unsets=True,
    )


def _number_text(value: int | None) -> str | None:
    # int(), because a bool counts as an int here, and must not end up as "True".
    return None if value is None else str(int(value))


def _check_device(name: str, value: str | None) -> str | None:
    check_isinstance(name, value, str)
    return value if value is None else check_device_text(name, value)


def _check_orphan_policy(name: str, value: str | None) -> str | None:
    check_isinstance(name, value, str)
    return value if value is None else check_orphan_policy(name, value)


def _check_heartbeat(name: str, value: int) -> int:
    return check_heartbeat(name, check_isinstance(name, value, int, allow_none=False))


def _check_within(low: int, high: int) -> _Check:
    def check(name: str, value: int) -> int:
        value = check_isinstance(name, value, int, allow_none=False)
        if not low <= value <= high:
            raise param_error(f"{name}={shown(value)} is out of range [{low}, {high}].")
        return value

    return check


def _check_device_id(name: str, value: Any) -> Any:  # noqa: ANN401 (whatever the user assigns)
    value = check_isinstance(name, value, (int, list, tuple), int, allow_none=False)
    for device_id in value if isinstance(value, (list, tuple)) else (value,):
        if device_id < 0:
            raise param_error(f"{name}={shown(device_id)} must not be negative.")
        check_int32(name, device_id)
    return value


def _device_id_text(value: int | list[int] | tuple[int, ...]) -> str:
    ids = value if isinstance(value, (list, tuple)) else (value,)
    if not ids:
        raise IndexError("device_id is an empty list; give the index of a device")
    return ";".join(str(int(device_id)) for device_id in ids)


def _check_timeout(name: str, value: int | str) -> int | str:
    value = check_isinstance(name, value, (int, str), allow_none=False)
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise param_error(f"{name}={value!r} is not a number.", remedy="give milliseconds")
    if int(value) <= 0:
        raise param_error(f"{name}={shown(value)} must be above 0.", remedy="give milliseconds")
    check_int32(name, int(value))
    return value


def _check_utilization(name: str, value: float) -> float:
    check_isinstance(name, value, float, allow_none=False)
    if not 0.0 <= value <= 1.0:
        raise param_error(f"{name}={value} is out of range [0, 1].")
    return value


def _check_cluster_info(name: str, value: str) -> str:
    check_isinstance(name, value, str, allow_none=False)
    info = json.loads(value)
    entries = info.get("listen_ip_info", []) if isinstance(info, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise param_error(f"{name} must be a JSON object whose listen_ip_info lists objects.")
    for entry in entries:
        if isinstance(entry.get("ip"), str):
            entry["ip"] = trans_str_ip(entry["ip"])
    return json.dumps(info)


def _check_ge_options(name: str, value: dict[str, str]) -> dict[str, str]:
    check_dict(name, value, str, str)
    return value


class LLMConfig:
    """Collects the options of `LLMDataDist.init` (reference API, 4). Takes nothing.

    Assigning a wrong type raises TypeError, an int outside its C width ValueError, anything else
    that is wrong LLMParamError. Attributes that this class does not know are ignored, with a
    warning that names the nearest option.
    """

    device_id = _Option[Any](
        "ge.exec.deviceId",
        None,
        _check_device_id,
        _device_id_text,
        "Index of the device: an int from 0, or a list of one.",
    )
    # Not in the reference.
    device = _Option[str](
        "llm.Device",
        DEVICES[0],
        _check_device,
        lambda value: value,
        'What Placement.DEVICE means: "npu", "cpu", or "auto" (the NPU where one can be used).',
        none_unsets=True,
    )
    sync_kv_timeout = _Option[Any](
        "llm.SyncKvCacheWaitTime",
        None,
        _check_timeout,
        lambda value: value if isinstance(value, str) else _number_text(value),
        "How long a pull or push may take, in ms, as int or digits; 1000 if unset.",
    )
    listen_ip_info = _text_if_any("llm.listenIpInfo", 'Where to listen: "ip:port".')
    transport = _text_if_any(
        "llm.Transport", "What moves bytes, by name (not in the reference); unset: the best."
    )
    # The next three are not in the reference.
    heartbeat_interval = _Option[int](
        "llm.HeartbeatInterval",
        HEARTBEAT_MS,
        _check_heartbeat,
        _number_text,
        "Deprecated, ignored: the kernel tells when a peer is gone.",
    )
    auto_relink = _flag(
        "llm.AutoRelink", "Whether using a lost link makes it anew; True if unset.", default=True
    )
    allow_ptrace = _flag(
        "llm.AllowPtrace",
        "Whether other processes of the same user may read and write this one's memory where Yama"
        " (ptrace_scope 1) forbids that, for peers that move caches of registered tensors; False if"
        " unset. Stays for the life of the process.",
        default=False,
    )
    orphan_policy = _Option[str](
        "llm.OrphanPolicy",
        KEEP,
        _check_orphan_policy,
        lambda value: value,
        'Request keys that a lost peer had begun to pull: "keep", "drop", or "offer_again".',
        none_unsets=True,
    )
    # Not in the reference.
    link_secret = _Option[str | None](
        "llm.LinkSecret",
        None,
        check_secret_value,
        lambda value: value,
        "Shared by all instances that may link; a random text of 16 characters and more.",
        none_unsets=True,
    )
    enable_cache_manager = _flag("llm.EnableCacheManager", "Must be True here.")
    enable_remote_cache_accessible = _flag(
        "llm.EnableRemoteCacheAccessible", "Whether peers may keep a copy of the cache table."
    )
    mem_pool_cfg = _text_if_any(
        "llm.MemPoolConfig", 'Device pool: JSON such as {"memory_size": 1048576, "page_shift": 16}.'
    )
    host_mem_pool_cfg = _text_if_any("llm.HostMemPoolConfig", "Host pool: JSON as mem_pool_cfg.")
    rdma_traffic_class = _Option[int | None](
        "llm.RdmaTrafficClass", None, check_uint32, _number_text, "RDMA traffic class, uint32."
    )
    rdma_service_level = _Option[int | None](
        "llm.RdmaServiceLevel", None, check_uint32, _number_text, "RDMA service level, uint32."
    )
    local_comm_res = _text_even_empty("llm.LocalCommRes", "Local resources; empty has a meaning.")
    transfer_backend = _text_even_empty("llm.TransferBackend", 'Transfer engine: "hixl".')
    global_resource_config = _text_even_empty(
        "llm.GlobalResourceConfig", "JSON handed to the transfer engine as it is."
    )
    # The reference lets 2^32-1 pass here, only to fail in init above 2^31-1.
    link_total_time = _Option[int](
        "llm.LinkTotalTime", 0, _check_within(0, INT32_MAX), _number_text, "Seconds for a link."
    )
    link_retry_count = _Option[int](
        "llm.LinkRetryCount", 1, _check_within(1, 100), _number_text, "Attempts for a link."
    )
    enable_switch_role = _Option[bool | None](
        "llm.EnableSwitchRole",
        False,
        lambda name, value: check_isinstance(name, value, bool),
        lambda value: "1" if value else None,
        "Ignored: roles can always be switched.",
    )
    buf_pool_cfg = _text_if_any("llm.BufPoolCfg", "Ignored.")
    mem_utilization = _Option[float](
        "llm.MemoryUtilization", 0.95, _check_utilization, str, "Ignored: a float in [0, 1]."
    )
    output_max_size = _Option[int | None](
        "llm.OutputMaxSize",
        None,
        lambda name, value: check_isinstance(name, value, int),
        _number_text,
        "Ignored.",
    )
    deploy_res_path = _text_if_any("llm.deployResPath", "Ignored.")
    cluster_info = _Option[str](
        "llm.ClusterInfo",
        "",
        _check_cluster_info,
        lambda value: value or None,
        "Ignored: JSON; IPv4 text in listen_ip_info[].ip becomes a number.",
    )
    ge_options = _Option[dict[str, str]](
        "", {}, _check_ge_options, lambda _: None, "Further options, merged in first."
    )

    def __init__(self) -> None:
        self._options: dict[str, str] = {}
        self.mem_utilization = 0.95  # the one option that is always given
        self.ge_options = {}

    def __setattr__(self, name: str, value: object) -> None:
        """Sets an option; an unknown name is kept, as in the reference, with a warning."""
        if not name.startswith("_") and not hasattr(type(self), name):
            _warn_of_unknown(name)
        object.__setattr__(self, name, value)

    def generate_options(self) -> dict[str, str]:
        """Makes the options of what is set now.

        Returns:
            A dict of its own, for `LLMDataDist.init`.

        Raises:
            IndexError: `device_id` is an empty list.
        """
        options = dict(self.ge_options)
        for option in _OPTIONS:
            text = option.option_text(self)
            if text is not None:
                options[option.key] = text
                if option is _DEVICE_ID:
                    options["ge.session_device_id"] = text.split(";", 1)[0]
        self._options = options
        return dict(options)

    gen_options = generate_options

    @property
    def options(self) -> dict[str, str]:
        """A copy of what `generate_options` last made; empty before its first call."""
        return dict(self._options)


_warned_names: set[str] = set()


def _warn_of_unknown(name: str) -> None:
    """Warns of an attribute that is not an option, once per name and process."""
    if name in _warned_names:
        return
    _warned_names.add(name)
    near = difflib.get_close_matches(name, [option.name for option in _OPTIONS], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    logger.warning("LLMConfig has no option %s: it does nothing%s", name, hint)


_OPTIONS = tuple(option for option in vars(LLMConfig).values() if isinstance(option, _Option))
_DEVICE_ID = LLMConfig.device_id
# All keys that LLMConfig can give.
LLM_CONFIG_KEYS = frozenset(option.key for option in _OPTIONS if option.key) | {
    "ge.session_device_id"
}

LlmConfig = LLMConfig
