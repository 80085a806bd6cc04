# SPDX-License-Identifier: Apache-2.0
"""A service whose caches are on an NPU, and processes that run it."""

from __future__ import annotations

import random
from typing import Any

import torch

from llm_datadist_torch import CacheDesc, DataType, LLMException
from llm_datadist_torch.transports.hixl.native import NativeLibrary
from llm_datadist_torch.transports.local.ipc import probe
from llm_datadist_torch.transports.local.ipc.exports import EXPORTS
from llm_datadist_torch.values.environment import npu_is_simulated
from tests import simulator_faults as faults
from tests.caches import Held
from tests.devices import overwrite, raw
from tests.peers import Failure, Peer, Service, spawn


def without_library(_: type) -> NativeLibrary:
    raise OSError("libcann_hixl.so can't be used: the test hides it")


_why_not = probe.why_not


def no_functions(_: torch.device) -> str:
    return "libascendcl.so has no aclrtIpcMemGetExportKey: the test hides it"


class NpuService(Service):
    """As its base; what it fills and dumps are the bytes of the tensors, one after the other."""

    def start(self, cluster_id: int, *, ipc: bool = False, **arguments: Any) -> int:
        """Without ``ipc`` as on a CANN that can't share device memory between processes."""
        self._before = faults.counts() if npu_is_simulated() else {}
        probe.why_not = _why_not if ipc else no_functions
        return super().start(cluster_id, **arguments)

    def finish(self) -> None:
        super().finish()
        probe.why_not = _why_not

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

    def expandable(self, on: bool) -> None:
        """New memory of torch_npu is in expandable segments, or not any more."""
        torch.npu.memory._set_allocator_settings(f"expandable_segments:{on}")  # type: ignore[attr-defined]

    def paths(self) -> set[str]:
        """The ways that bytes went, of all transfers of this instance."""
        return {counter.path for counter in self.dd.stats().transfers}

    def reason(self, peer: int) -> str:
        """Why device memory goes the way it goes on a link."""
        (info,) = (info for info in self.dd.links() if info.peer == peer)
        return next(choice.reason for choice in info.choices if choice.memory == "device")

    def exported(self) -> int:
        """Bytes of device memory that peers were given keys to."""
        return EXPORTS.open_bytes

    def empty_cache(self) -> int:
        """Give torch_npu's unused memory back; the bytes that it keeps."""
        torch.npu.empty_cache()  # type: ignore[attr-defined]
        return torch.npu.memory_reserved()  # type: ignore[attr-defined,no-any-return]

    def memory_allocated(self) -> int:
        """Bytes of device memory that torch_npu has given out."""
        return torch.npu.memory_allocated()  # type: ignore[attr-defined,no-any-return]

    def calls(self, function: str) -> int:
        """How often a function was called since the start of this service."""
        return faults.count(function) - self._before.get(function, 0)


def spawn_npu() -> Peer:
    """A process with a service on an NPU."""
    return spawn(NpuService)
