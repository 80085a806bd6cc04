# SPDX-License-Identifier: Apache-2.0
"""Which transports there are, which of them an instance gets, and why not the others.

Others add theirs by an entry point of the group ``llm_datadist_torch.transports``: its name is the
transport's name, its object the :class:`~llm_datadist_torch.transports.base.Transport` class.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from importlib.metadata import EntryPoint, entry_points

import torch

from llm_datadist_torch.transports.base import Transport
from llm_datadist_torch.transports.choice import TransportSet
from llm_datadist_torch.transports.hixl import HixlTransport
from llm_datadist_torch.transports.local import LocalTransport
from llm_datadist_torch.transports.nixl import NixlTransport
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.config import EngineConfig
from llm_datadist_torch.values.enums import LLMRole
from llm_datadist_torch.values.status import LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

ENTRY_POINT_GROUP = "llm_datadist_torch.transports"
_BUILT_IN: tuple[type[Transport], ...] = (LocalTransport, HixlTransport, NixlTransport)


def known_transports() -> tuple[dict[str, type[Transport]], dict[str, str]]:
    """All transports that are installed.

    Returns:
        Classes by name, and for those that can't be loaded why not, by name.
    """
    classes: dict[str, type[Transport]] = {cls.name: cls for cls in _BUILT_IN}
    broken: dict[str, str] = {}
    for entry in _entry_points(tuple(sys.path)):
        try:
            classes[entry.name] = _load(entry, classes)
        except Exception as error:  # noqa: BLE001  somebody else's code must not break ours
            broken[entry.name] = f"its entry point {entry.value!r} is broken: {error}"
    return classes, broken


def why_unavailable(device: torch.device) -> dict[str, str]:
    """Of all transports, preferred ones first: why an instance can't have it, "" if it can.

    Args:
        device: What ``Placement.DEVICE`` is; the instance listens on loopback, and asks for it.
    """
    classes, broken = known_transports()
    listen = ("127.0.0.1", 0)
    reasons = {
        cls.name: cls.availability(
            EngineConfig(LLMRole.MIX, listen=listen, transport=cls.name), device
        )
        for cls in _by_preference(classes)
    }
    return {name: reason or "" for name, reason in reasons.items()} | broken


def open_transports(config: EngineConfig, device: torch.device) -> TransportSet:
    """Start the transports of an instance: the one it asks for, or all that are available.

    Args:
        config: ``transport`` asks for one.
        device: What ``Placement.DEVICE`` is.

    Raises:
        LLMParamError: There is no transport of the name that is asked for.
        LLMFeatureNotEnabledError: That one is not available.
    """
    classes, unavailable = known_transports()
    if config.transport is not None:
        opened = [_open_wanted(config.transport, classes, unavailable, config, device)]
        return TransportSet(opened, {})
    opened = []
    for cls in _by_preference(classes):
        try:
            reason = cls.availability(config, device)
            if reason is None:
                opened.append(cls(config, device))
                continue
        except Exception as error:  # noqa: BLE001  one that fails leaves the others
            reason = f"it does not start: {error}"
            logger.warning("transport %s is not used, %s", cls.name, reason)
        unavailable[cls.name] = reason
    return TransportSet(opened, unavailable)


def _open_wanted(
    wanted: str,
    classes: dict[str, type[Transport]],
    broken: dict[str, str],
    config: EngineConfig,
    device: torch.device,
) -> Transport:
    if wanted not in classes and wanted not in broken:
        raise param_error(
            f"there is no transport {wanted!r}, only {', '.join(sorted(classes))}",
            remedy="install the package that has it, or leave LLMConfig.transport unset.",
        )
    reason = broken.get(wanted) or classes[wanted].availability(config, device)
    if reason is not None:
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"transport {wanted!r} is not available: {reason}",
            op="init",
            remedy="leave LLMConfig.transport and transfer_backend unset to use what is available.",
        )
    return classes[wanted](config, device)


def _by_preference(classes: dict[str, type[Transport]]) -> list[type[Transport]]:
    return sorted(classes.values(), key=lambda cls: cls.preference, reverse=True)


@functools.lru_cache(maxsize=1)
def _entry_points(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:  # noqa: ARG001  the cache's key
    """Looking through all installed packages takes milliseconds: once per ``sys.path``."""
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _load(entry: EntryPoint, taken: dict[str, type[Transport]]) -> type[Transport]:
    if entry.name in taken:
        raise ValueError("there is a transport of this name already")
    cls = entry.load()
    if not (isinstance(cls, type) and issubclass(cls, Transport)) or inspect.isabstract(cls):
        raise TypeError("it is no complete subclass of Transport")
    for member in ("name", "capabilities", "preference"):
        if not hasattr(cls, member):
            raise TypeError(f"it has no {member}")
    if cls.name != entry.name:
        raise ValueError(f"the class calls itself {cls.name!r}")
    return cls
