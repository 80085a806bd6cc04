# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share, and the only place that decides what is skipped."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Generator, Iterator

import pytest

from llm_datadist_torch.values.environment import npu_is_simulated

# torch loads its backends by itself, and can't be imported where torch_npu is installed without the
# Ascend runtime. The tests that are about torch_npu import it.
if not npu_is_simulated():
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

# Tests with network namespaces make and remove interfaces while others run beside them. UCX takes
# every interface that is there when it starts, and a transfer over one that is removed waits for
# ever, or ends its process.
os.environ.setdefault("UCX_NET_DEVICES", "lo")

import torch

from llm_datadist_torch import LLMConfig, LLMDataDist, LLMRole
from llm_datadist_torch.memory.device import why_no_npu

InstanceFactory = Callable[..., LLMDataDist]

_cluster_ids = itertools.count(1000)


def _pool_text(pool: int | tuple[int, int] | str) -> str:
    if isinstance(pool, str):
        return pool
    size, shift = pool if isinstance(pool, tuple) else (pool, 16)
    return json.dumps({"memory_size": size, "page_shift": shift})


def make_options(
    *,
    remote: bool = False,
    listen: str | None = "127.0.0.1:0",
    pool: int | tuple[int, int] | str | None = None,
    host_pool: int | tuple[int, int] | str | None = None,
    timeout_ms: int | None = None,
    **further: str,
) -> dict[str, str]:
    """Options for ``init``. A pool is its bytes, (bytes, page_shift), or its JSON text."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = remote
    if listen is not None:
        config.listen_ip_info = listen
    if timeout_ms is not None:
        config.sync_kv_timeout = timeout_ms
    if pool is not None:
        config.mem_pool_cfg = _pool_text(pool)
    if host_pool is not None:
        config.host_mem_pool_cfg = _pool_text(host_pool)
    return config.generate_options() | further


@pytest.fixture
def instance_factory() -> Iterator[InstanceFactory]:
    """Makes initialised ``LLMDataDist`` instances on a free port, and finalizes them in the end.

    ``instance_factory(cluster_id=None, role=LLMRole.MIX, **make_options)``; without a cluster id it
    takes one that nothing else has.
    """
    made: list[LLMDataDist] = []

    def make(
        cluster_id: int | None = None, role: LLMRole = LLMRole.MIX, **options: object
    ) -> LLMDataDist:
        datadist = LLMDataDist(role, next(_cluster_ids) if cluster_id is None else cluster_id)
        made.append(datadist)
        datadist.init(make_options(**options))
        return datadist

    yield make
    for datadist in reversed(made):
        datadist.finalize()


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _num_npus() -> int:
    return 0 if why_no_npu()[0] else torch.npu.device_count()  # type: ignore[attr-defined]


def _has_netns() -> bool:
    name = f"probe{os.getpid()}"
    try:
        for action in ("add", "del"):
            subprocess.run(["ip", "netns", action, name], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


# marker -> (what it needs, whether this machine has it)
_NEEDS: dict[str, tuple[str, Callable[[], bool]]] = {
    "needs_ipv6": ("the IPv6 loopback address", _has_ipv6),
    "needs_npu": ("an NPU, real or simulated (pytest --ascend-sim)", lambda: _num_npus() > 0),
    "host_memory_only": ("caches of placement DEVICE in host memory", lambda: _num_npus() == 0),
    "whole_programs": (
        "the simulator's scheduler `lazy`: it starts programs, too slow for each scheduler",
        lambda: not npu_is_simulated() or os.environ["ASCEND_SIM_SCHEDULER"] == "lazy",
    ),
    "needs_torch_npu": (
        "torch_npu, installed; an NPU is not needed",
        lambda: importlib.util.find_spec("torch_npu") is not None,
    ),
    "needs_two_npus": ("two NPUs", lambda: _num_npus() >= 2),
    "needs_simulated_npu": ("a simulated NPU, to make it fail", npu_is_simulated),
    "needs_nixl": (
        "the package nixl-cu12",
        lambda: importlib.util.find_spec("nixl_cu12") is not None,
    ),
    "needs_hixl": ("HIXL's Python module", lambda: importlib.util.find_spec("hixl") is not None),
    "needs_netns": ("network namespaces: root, and the command ip", _has_netns),
    "needs_rich": ("the package rich", lambda: importlib.util.find_spec("rich") is not None),
    "needs_prometheus": (
        "the package prometheus_client",
        lambda: importlib.util.find_spec("prometheus_client") is not None,
    ),
    "needs_opentelemetry": (
        "the package opentelemetry-sdk",
        lambda: importlib.util.find_spec("opentelemetry") is not None,
    ),
    "needs_matplotlib": (
        "the package matplotlib",
        lambda: importlib.util.find_spec("matplotlib") is not None,
    ),
    "needs_strace": ("the command strace", lambda: shutil.which("strace") is not None),
    "needs_root": ("root, to become other users", lambda: os.geteuid() == 0),
}


_SAME_ON_EVERY_DEVICE = "same_on_every_device"
"""Marks what no device makes a difference to: it is run once, where there is no NPU."""
_THOROUGH = "thorough"
"""Marks what ``make test`` and ``test-vllm`` leave to ``make test-all`` and ``test-vllm-all``."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{_SAME_ON_EVERY_DEVICE}: the test is left out on NPUs")
    config.addinivalue_line("markers", f"{_THOROUGH}: the test is left to make test-all")
    for marker, (what, _) in _NEEDS.items():
        config.addinivalue_line("markers", f"{marker}: the test needs {what}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _num_npus() > 0:
        same = [item for item in items if item.get_closest_marker(_SAME_ON_EVERY_DEVICE)]
        config.hook.pytest_deselected(items=same)
        items[:] = [item for item in items if not item.get_closest_marker(_SAME_ON_EVERY_DEVICE)]
    for marker, (what, available) in _NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"needs {what}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show why tests were run again (``TEST_RERUNS`` of make): each is a fault to look into."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.write_sep("_", f"run again: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Some tests log texts that are not UTF-8, and pytest-xdist can't pass those on."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode())
        for title, text in report.sections
    ]
    return report
