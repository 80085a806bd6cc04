# SPDX-License-Identifier: Apache-2.0
"""A service whose caches are on an NPU, and processes that run it."""

from __future__ import annotations

import random
from typing import Any

import torch

from llm_datadist_torch import CacheDesc, DataType, LLMException
from llm_datadist_torch.transports.hixl.native import NativeLibrary
from llm_datadist_torch.values.environment import npu_is_simulated
from tests import simulator_faults as faults
from tests.caches import Held
from tests.devices import overwrite, raw
from tests.peers import Failure, Peer, Service, spawn


def without_library(_: type) -> NativeLibrary:
    raise OSError("libcann_hixl.so can't be used: the test hides it")


class NpuService(Service):
    """As its base; what it fills and dumps are the bytes of the tensors, one after the other."""

    def start(self, cluster_id: int, **arguments: Any) -> int:
        self._before = faults.counts() if npu_is_simulated() else {}
        return super().start(cluster_id, **arguments)

    def _tensors(self, name: str) -> tuple[torch.Tensor, ...]:
        return self.held[name].cache.tensors

    def fill(self, name: str, seed: int) -> bytes:
        """Random bytes in every tensor, there when this returns."""
        stream, data = random.Random(seed), b""
        for tensor in self._tensors(name):
            part = stream.randbytes(tensor.numel())
            overwrite(tensor.view(-1), part)
            data += part
        return data

    def dump(self, name: str) -> bytes:
        """The bytes of all tensors."""
        return b"".join(raw(tensor) for tensor in self._tensors(name))

    def adopt(self, name: str, count: int, rows: int, row_bytes: int, key: Any = None) -> None:
        """A registered blocks cache over views of one tensor on the device."""
        self.base = torch.zeros(count, rows, row_bytes, dtype=torch.uint8, device="npu:0")
        desc = CacheDesc(count, [rows, row_bytes], DataType.DT_UINT8)
        cache = self.manager.register_blocks_cache(desc, list(self.base), key)
        self._keep(name, cache, cache.tensor_addrs[0], self.base.numel(), self.base)

    def adopt_addresses(
        self, name: str, count: int, rows: int, row_bytes: int, key: Any = None
    ) -> None:
        """As `adopt`, by bare addresses: nothing but this service keeps the memory."""
        self.base = torch.zeros(count, rows, row_bytes, dtype=torch.uint8, device="npu:0")
        desc = CacheDesc(count, [rows, row_bytes], DataType.DT_UINT8)
        addresses = [tensor.data_ptr() for tensor in self.base]
        cache = self.manager.register_blocks_cache(desc, addresses, key)
        self._keep(name, cache, addresses[0], self.base.numel(), self.base)

    def free_under_the_cache(self, name: str) -> None:
        """Give the memory of `adopt_addresses` back to the runtime."""
        held = self.held[name]
        self.held[name] = Held(held.cache, held.address, held.nbytes, None, held.span)
        del self.base, held
        torch.npu.empty_cache()  # type: ignore[attr-defined]

    def attempt_to(self, name: str, *args: Any, **kwargs: Any) -> Failure | None:
        """Call a method of this service; its typed failure is returned."""
        try:
            getattr(self, name)(*args, **kwargs)
        except LLMException as error:
            return Failure(type(error).__name__, error.status_code.name, str(error))
        return None

    # -- faults of the simulator ------------------------------------------------------------------

    def hang(self, call: int = 1, times: int = 1) -> None:
        """HIXL's transfers never come to an end, from the k-th on."""
        faults.fail("hixl.move", call, code=103901, times=times)

    def break_(self, function: str, code: int, call: int = 1, times: int = 1) -> None:
        faults.fail(function, call, code=code, times=times)

    def mend(self) -> None:
        if npu_is_simulated():
            faults.reset()

    def use_the_module(self) -> None:
        """HIXL's C++ class is not there, only its Python module is."""
        NativeLibrary.load = classmethod(without_library)  # type: ignore[assignment]

    def slow(self, function: str, seconds: float) -> None:
        """Every call of a function takes longer."""
        faults.delay(function, seconds, times=0)

    def registered(self) -> int:
        """How many ranges are registered with HIXL."""
        transports = self.instance._transports._transports
        return len(transports["hixl"]._memory.ranges)  # type: ignore[attr-defined]

    def memory_allocated(self) -> int:
        """Bytes of device memory that torch_npu has given out."""
        return torch.npu.memory_allocated()  # type: ignore[attr-defined,no-any-return]

    def calls(self, function: str) -> int:
        """How often a function was called since the start of this service."""
        return faults.count(function) - self._before.get(function, 0)


def spawn_npu() -> Peer:
    """A process with a service on an NPU."""
    return spawn(NpuService)
