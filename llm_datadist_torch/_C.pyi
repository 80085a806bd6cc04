# SPDX-License-Identifier: Apache-2.0
"""Types of the C++ extension; importing it also registers torch.ops.llm_datadist_torch."""

import torch

# --- copies: runs.h, copy_engine.h ---

def block_runs(
    dst_ids: torch.Tensor, src_ids: torch.Tensor, dst_pitch: int, src_pitch: int, nbytes: int
) -> torch.Tensor: ...
def check_ids(name: str, ids: torch.Tensor, rows: int, unique: bool = False) -> None: ...
def measure_runs(runs: torch.Tensor) -> tuple[int, int, int]: ...
def rebase(
    addrs: torch.Tensor, from_base: int, to_base: int, nbytes: int, extent: int
) -> torch.Tensor: ...
def copy_runs(
    dst_bases: torch.Tensor, src_bases: torch.Tensor, runs: torch.Tensor, deadline_ns: int = 0
) -> int: ...

# --- copies that involve device memory: device_copy.h

def copy_runs_on_device(
    dst_bases: torch.Tensor,
    src_bases: torch.Tensor,
    runs: torch.Tensor,
    dst_device: torch.device,
    src_device: torch.device,
    deadline_ns: int = 0,
) -> int: ...

# --- memory: host_region.h, arena.h, address_probe.h; transfers: process_memory.h ---

class HostRegion:
    @staticmethod
    def create(nbytes: int, shareable: bool = True) -> HostRegion: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def fd(self) -> int: ...
    @property
    def inode(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def reason(self) -> str: ...
    def tensors(
        self, offsets: list[int], shape: list[int], dtype: torch.dtype
    ) -> list[torch.Tensor]: ...

class Arena:
    def __init__(self, region_base: torch.Tensor, page_shift: int) -> None: ...
    def allocate(
        self, count: int, shape: list[int], dtype: torch.dtype
    ) -> list[torch.Tensor] | None: ...
    def stats(self) -> tuple[int, int, int, int]: ...

def tensor_over(address: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor: ...
def probe_extents(addrs: torch.Tensor, nbytes: int) -> tuple[int, str]: ...
def check_mapped(addrs: torch.Tensor, nbytes: int) -> int: ...

# ---- other processes of this host (bind_transfer.cpp)

class PeerMapping:
    @staticmethod
    def open(pid: int, fd: int, inode: int, device: int, nbytes: int) -> PeerMapping: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def close(self) -> None: ...

def read_process(
    pid: int,
    local_bases: torch.Tensor,
    remote_bases: torch.Tensor,
    runs: torch.Tensor,
    deadline_ns: int = 0,
) -> tuple[int, int]: ...
def engine_request(
    runs: torch.Tensor, start: tuple[int, int], max_bytes: int, max_runs: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]: ...
def bytes_inside(
    starts: torch.Tensor,
    sizes: torch.Tensor,
    bases: torch.Tensor,
    extent: int,
    pitch: int,
    row_bytes: int,
) -> int: ...
def load_word(address: int) -> int: ...
def bump_word(address: int) -> int: ...
def write_process(
    pid: int,
    local_bases: torch.Tensor,
    remote_bases: torch.Tensor,
    runs: torch.Tensor,
    deadline_ns: int = 0,
) -> tuple[int, int]: ...
