# SPDX-License-Identifier: Apache-2.0
"""NPU tensors of two processes, moved by the simulated module ``hixl``."""

from __future__ import annotations

import pytest

from tests.hixl_peers import Peer, free_name

pytestmark = pytest.mark.needs_torch_npu

SETUP = """
import torch, torch_npu
def share(tensor):
    torch.npu.synchronize()
    size = tensor.numel() * tensor.element_size()
    assert e.register_mem(hixl.MemDesc(tensor.data_ptr(), size), hixl.MEM_DEVICE)[0] == 0
    return tensor.data_ptr(), size
"""


@pytest.fixture(scope="module")
def pair():
    both = Peer(), Peer(PYTORCH_NPU_ALLOC_CONF="expandable_segments:True")
    for peer in both:
        peer.begin(SETUP)
    for peer in both:
        peer.answer()
    yield both
    for peer in both:
        peer.close()


@pytest.fixture
def linked(pair):
    """Both processes with `e`, linked from the first to the second, and a tensor `t` of each."""
    here, there = pair
    name = free_name()
    there("e = engine(name); t = torch.arange(12 << 20, dtype=torch.int32).npu()", name=name)
    far, size = there("share(t)")
    here("e = engine('127.0.0.1'); t = torch.zeros(12 << 20, dtype=torch.int32).npu(); share(t)")
    assert here("e.connect(remote)", remote=name, far=far, size=size) == 0
    yield here, there
    for peer in pair:
        peer("reset(); del t")


READ = "e.transfer_sync(remote, hixl.READ, descs((t.data_ptr(), far, size)))"
WRITE = "e.transfer_sync(remote, hixl.WRITE, descs((t.data_ptr(), far, size)))"
COUNTED = "bool((t.cpu() == torch.arange(12 << 20, dtype=torch.int32)).all())"


def test_tensors_are_read_and_written(linked):
    here, there = linked
    segments = "faults.count('aclrtReserveMemAddress')"
    assert (here(segments), there(segments) > 0) == (0, True), "both kinds of segments are tried"
    assert here(READ) == 0
    assert here(COUNTED)
    here("t.mul_(2); torch.npu.synchronize()")
    assert here(WRITE) == 0
    there("t = t // 2")
    assert there(COUNTED)


def test_a_missing_synchronization_shows(linked):
    """The engine reads what is in memory now; what is still in a stream, it doesn't see."""
    here, there = linked
    there("t.add_(1); None")
    assert here(READ) == 0
    assert here(COUNTED), "the peer's kernel had not run"
    there("torch.npu.synchronize()")
    assert here(READ) == 0
    assert here("int(t[0].cpu()), int(t[-1].cpu())") == (1, 12 << 20)


def test_kernels_queued_before_a_read_come_after_it(linked):
    here, _ = linked
    here("t.fill_(5); None")
    assert here(READ) == 0
    assert here("t.cpu().unique().tolist()") == [5], "the kernel overwrote what was read"
    here("t.fill_(5); torch.npu.synchronize()")
    assert here(READ) == 0
    assert here(COUNTED)


def test_threads_set_their_device(linked):
    here, _ = linked
    code = f"""
    def work():
        before = {READ}
        torch.npu.set_device(0)
        return before, {READ}
    in_thread(work)
    """
    assert here(code) == (503900, 0)
    assert here(COUNTED)
