# SPDX-License-Identifier: Apache-2.0
"""NIXL's agents, through its bindings: quiet, with event-driven progress, with typed errors."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_datadist_torch.values.environment import defaults, environment_text
from llm_datadist_torch.values.status import LLMStatusCode, error_for

_PACKAGES = {"nixl_cu12": "nixl-cu12", "nixl_cu13": "nixl-cu13"}
_VERSION = "1.5."
"""The bindings below NIXL's Python class, which may change with any other version."""
_FIX = 'pip install "llm_datadist_torch[nixl]"'
_QUIET = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal", "UCX_ERROR_SIGNALS": ""}
"""Read by the libraries when they are loaded; what the user has set stays."""
_WAKE_US = 20_000
"""How often the progress thread looks around without being woken. NIXL's own default, 0, spins
(findings/nixl_idle_agent_spins.sh)."""

_PROVIDERS = Path("/etc/libibverbs.d")
"""Where the packages of RDMA providers name what they install."""

logger = logging.getLogger("llm_datadist_torch")

_loading = threading.Lock()
_warned = False


def why_not_installed() -> str | None:
    """Why NIXL can't be used here, and the fix; nothing is imported."""
    module = _installed()
    if module is None:
        return f"the package nixl-cu12 is not installed: {_FIX}"
    if importlib.util.find_spec("numpy") is None:
        return f"NIXL needs numpy, which is not installed: {_FIX}"
    version = importlib.metadata.version(_PACKAGES[module])
    if not version.startswith(_VERSION):
        return f"{_PACKAGES[module]} {version} is installed, {_VERSION}x is needed: {_FIX}"
    return None


def why_exit_crashes() -> str:
    """Why a process that has used NIXL will end with SIGSEGV here; "" if nothing speaks for it.

    Where providers of RDMA are installed, the destructor of a library in NIXL's wheel faults when
    the process exits, after all work is done: its exit status is wrong.
    """
    if environment_text("UCX_MODULES"):
        return ""
    found = min(_PROVIDERS.glob("*.driver"), default=None)
    if found is None:
        return ""
    return (
        f"RDMA providers are installed ({found}): a process that has used NIXL may end with SIGSEGV"
        " after its work is done. UCX_MODULES=^ib in its environment prevents that where no RDMA"
        " device is used"
    )


def _warn_of_exit() -> None:
    """Once per process, before NIXL is loaded."""
    global _warned
    if not _warned:
        _warned = True
        reason = why_exit_crashes()
        if reason:
            logger.warning("%s", reason)


def _installed() -> str | None:
    return next((name for name in _PACKAGES if importlib.util.find_spec(name)), None)


def _bindings() -> Any:  # noqa: ANN401  NIXL's bindings have no type information
    name = _installed()
    if name is None:
        raise error_for(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, str(why_not_installed()))
    raises = logging.raiseExceptions
    try:
        return importlib.import_module(f"{name}._bindings")
    finally:
        logging.raiseExceptions = raises  # NIXL's own set-up of logging switches it off


@contextmanager
def _typed(module: Any, doing: str) -> Iterator[None]:  # noqa: ANN401  see _bindings
    """NIXL's errors as ours; they are RuntimeErrors of its own."""
    try:
        yield
    except module.nixlRemoteDisconnectError as error:
        raise error_for(
            LLMStatusCode.LLM_NOT_YET_LINK,
            f"NIXL could not {doing}: {error}",
            remedy="see whether the peer still runs; the next use of the link connects anew.",
        ) from error
    except Exception as error:
        if not type(error).__name__.startswith("nixl"):
            raise
        raise error_for(
            LLMStatusCode.LLM_FAILED,
            f"NIXL could not {doing}: {error}",
            remedy="see that both hosts reach each other on the network that UCX picks"
            " (UCX_NET_DEVICES, UCX_TLS); NIXL_LOG_LEVEL=INFO and UCX_LOG_LEVEL=info say more.",
        ) from error


class Agent:
    """One NIXL agent with UCX, for one direction of one link.

    The only way to stop what NIXL has begun is to end its agent: ``releaseXferReq`` answers
    "success" for a transfer under way, and its bytes go on landing
    (findings/nixl_release_goes_on.sh).

    Thread safety: one thread at a time, except that ``deregister`` may come from any.

    Args:
        receives: Peers write into memory that it registers; a thread of NIXL's sees to that. Else
            it writes, and progresses while :meth:`poll` is called.

    Raises:
        LLMException: NIXL does not start.
    """

    def __init__(self, *, receives: bool) -> None:
        with _loading, defaults(_QUIET):
            _warn_of_exit()
            self._module = module = _bindings()
            config = module.nixlAgentConfig()
            config.useProgThread = receives
            config.useListenThread = False
            config.pthrDelay = _WAKE_US
            config.syncMode = module.NIXL_THREAD_SYNC_STRICT
            self.name = uuid.uuid4().hex
            with _typed(module, "start an agent"):
                self._agent = module.nixlAgent(self.name, config)
                self._ucx = [self._agent.createBackend("UCX", {})]

    def register(self, table: Any) -> Any:  # noqa: ANN401  numpy comes with NIXL
        """Register memory, [n, 3] of (address, nbytes, 0) in uint64; returns NIXL's list of it."""
        memory = self._module.nixlRegDList(self._module.DRAM_SEG, table)
        with _typed(self._module, f"register {len(table)} spans of memory"):
            self._agent.registerMem(memory, self._ucx)
        return memory

    def deregister(self, memory: object) -> None:
        """Take back a :meth:`register`."""
        with _typed(self._module, "deregister memory"):
            self._agent.deregisterMem(memory, self._ucx)

    def describe(self, table: Any) -> bytes:  # noqa: ANN401  see register
        """What a peer's agent must load to write to these registered spans."""
        memory = self._module.nixlRegDList(self._module.DRAM_SEG, table)
        with _typed(self._module, "describe its memory"):
            described: bytes = self._agent.getLocalPartialMD(memory, True, self._ucx)
        return described

    def load(self, described: bytes) -> str:
        """Learn of a peer's memory; returns the name of its agent."""
        with _typed(self._module, "connect to the peer's agent"):
            name: bytes = self._agent.loadRemoteMD(described)
        return name.decode()

    def forget(self, peer: str) -> None:
        """What was loaded of a peer's agent is out of date."""
        with _typed(self._module, "forget a peer"):
            self._agent.invalidateRemoteMD(peer)

    def write(self, local: Any, remote: Any, peer: str) -> tuple[int, bool]:  # noqa: ANN401
        """Start to write local memory to a peer's; tables as in :meth:`register`.

        Returns:
            A number for :meth:`poll` and :meth:`release`, and whether it is done already.
        """
        module = self._module
        with _typed(module, "write to the peer"):
            handle: int = self._agent.createXferReq(
                module.NIXL_WRITE,
                module.nixlXferDList(module.DRAM_SEG, local),
                module.nixlXferDList(module.DRAM_SEG, remote),
                peer,
                "",
                self._ucx,
            )
            return handle, self._agent.postXferReq(handle, "") != module.NIXL_IN_PROG

    def poll(self, handle: int) -> bool:
        """Whether a write is done, its bytes in the peer's memory; makes progress."""
        with _typed(self._module, "write to the peer"):
            return bool(self._agent.getXferStatus(handle) != self._module.NIXL_IN_PROG)

    def release(self, handle: int) -> None:
        """Release a write that is done."""
        with _typed(self._module, "release a request"):
            self._agent.releaseXferReq(handle)

    def close(self) -> None:
        """End it: afterwards nothing moves any more, here or at the peer. Idempotent."""
        # The last reference: its end joins NIXL's thread and closes UCX's worker and sockets.
        self._agent = None
