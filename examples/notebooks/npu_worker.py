# SPDX-License-Identifier: Apache-2.0
"""The other process of notebook 04: it pulls blocks into a cache on a device of its own."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

import llm_datadist_torch as ld


def pull(pipe: Connection) -> None:
    """Pulls once, and says which way the bytes went and what they add up to.

    Args:
        pipe: brings address, index of the device, arguments of `allocate`, and blocks.
    """
    address, device_id, sizes, blocks = pipe.recv()
    # It listens because HIXL's engine needs an address.
    with ld.open(device_id=device_id, listen="127.0.0.1:0") as node:
        cache = node.allocate(**sizes)
        peer = node.connect(address)
        peer.pull("kv", cache, src_blocks=blocks, dst_blocks=range(len(blocks)))
        total = sum(
            float(tensor[: len(blocks)].sum(dtype=torch.float32)) for tensor in cache.tensors
        )
        path = node.stats().recent[-1].path
        pipe.send((str(cache.device), [str(choice) for choice in peer.link.choices], path, total))
        pipe.recv()
