# SPDX-License-Identifier: Apache-2.0
"""Programs that forget a synchronisation, whose data must be wrong, and the same without mistake.

A program returns whether its data were right. Which scheduler shows which mistake is checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from ascend_sim.environment import environment_text

SIZE = 1 << 12
ROUNDS = 40
numbers = itertools.count(1)

Program = Callable[[bool], bool]


def read_after_write(is_correct: bool) -> bool:
    """Reads on the host what a copy in a stream is still to bring."""
    number = next(numbers)
    there = torch.full((SIZE,), number, device="npu:0")
    here = torch.zeros(SIZE, dtype=there.dtype, pin_memory=True)
    torch.npu.synchronize()
    here.copy_(there, non_blocking=True)
    if is_correct:
        torch.npu.current_stream().synchronize()
    seen = here.clone()
    torch.npu.synchronize()
    return bool((seen == number).all())


def write_after_read(is_correct: bool) -> bool:
    """Writes on the host over what a copy in a stream is still to fetch."""
    number = next(numbers)
    here = torch.full((SIZE,), number).pin_memory()
    torch.npu.synchronize()
    there = here.to("npu:0", non_blocking=True)
    if is_correct:
        torch.npu.current_stream().synchronize()
    here.fill_(-1)
    return bool((there.cpu() == number).all())


def between_streams(is_correct: bool) -> bool:
    """Reads in one stream what another writes, without waiting for its event."""
    number = next(numbers)
    writer, reader = torch.npu.Stream(), torch.npu.Stream()
    buffer = torch.zeros(SIZE, dtype=torch.int64, device="npu:0")
    seen = torch.zeros(SIZE, dtype=torch.int64, device="npu:0")
    torch.npu.synchronize()
    event = torch.npu.Event()
    with torch.npu.stream(writer):
        buffer.fill_(number)
        event.record()
    with torch.npu.stream(reader):
        if is_correct:
            event.wait()
        seen.copy_(buffer)
    reader.synchronize()
    result = bool((seen.cpu() == number).all())
    torch.npu.synchronize()
    return result


def overwrites_between_streams(is_correct: bool) -> bool:
    """Writes in one stream over what another is still to read; the reader is waited for first."""
    number = next(numbers)
    reader, writer = torch.npu.Stream(), torch.npu.Stream()
    buffer = torch.full((SIZE,), number, device="npu:0")
    seen = torch.zeros_like(buffer)
    torch.npu.synchronize()
    event = torch.npu.Event()
    with torch.npu.stream(reader):
        seen.copy_(buffer)
        event.record()
    with torch.npu.stream(writer):
        if is_correct:
            event.wait()
        buffer.fill_(-1)
    reader.synchronize()
    writer.synchronize()
    return bool((seen.cpu() == number).all())


def wrong_rounds(program: Program, is_correct: bool) -> int:
    return sum(not program(is_correct) for _ in range(ROUNDS))


def check_correct_programs_are_right():
    for program in (
        read_after_write,
        write_after_read,
        between_streams,
        overwrites_between_streams,
    ):
        assert wrong_rounds(program, is_correct=True) == 0, program.__name__


def check_missing_synchronisations_show():
    wrong = {
        program.__name__: wrong_rounds(program, is_correct=False)
        for program in (
            read_after_write,
            write_after_read,
            between_streams,
            overwrites_between_streams,
        )
    }
    scheduler = environment_text("ASCEND_SIM_SCHEDULER")
    if scheduler == "lazy":
        # Every time, but for the one that waits in an order that happens to be right.
        assert wrong == dict.fromkeys(wrong, ROUNDS) | {"overwrites_between_streams": 0}
    elif scheduler == "random":
        assert all(wrong.values()), wrong
    else:
        # torch_npu's own queue still is asynchronous to the host; what is on the device isn't.
        assert wrong["between_streams"] == wrong["overwrites_between_streams"] == 0, wrong
