# SPDX-License-Identifier: Apache-2.0
"""Calls work on their instance's device, whatever device the calling thread has.

Much of what a call does asks the runtime about the thread's current device without naming one:
memory that is pinned, events that are recorded, addresses that are looked up.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from llm_datadist_torch.api.cache_manager import CacheManager
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.memory.address import HOST


def manager_of(instance: Instance) -> CacheManager:
    """The ``CacheManager`` of an instance.

    On an NPU its public methods run with the instance's device as the thread's current one, and the
    thread gets back what it had. In host memory they cost nothing more.
    """
    kind = CacheManager if instance.device.device == HOST else _on_npu()
    return kind(instance)


@functools.cache
def _on_npu() -> type[CacheManager]:
    methods = {
        name: _on_device(name, method)
        for name, method in inspect.getmembers(CacheManager, inspect.isfunction)
        if not name.startswith("_")
    }
    return type(CacheManager.__name__, (CacheManager,), methods)


def _on_device(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: CacheManager, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        # Looked up in each call: a program may have put a method of its own in its place.
        with self._instance.device.current():
            return getattr(CacheManager, name)(self, *args, **kwargs)

    return call
