# SPDX-License-Identifier: Apache-2.0
"""A pull of 64 MiB between two instances of this process, compared byte by byte, and timed."""

from __future__ import annotations

import torch

from llm_datadist_torch.api.node import Node
from llm_datadist_torch.api.opening import open as open_node
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.cli.report import Finding
from llm_datadist_torch.observe.html import size, speed_of
from llm_datadist_torch.values.status import LLMException

_BLOCKS, _BLOCK_BYTES = 512, 64 * 1024
_NAME = "loopback"


def _open(listen: str | None) -> Node:
    return open_node(listen=listen, device="cpu", transport="local")


def _cache(node: Node) -> Cache:
    shape = (_BLOCK_BYTES,)
    return node.allocate(layers=1, blocks=_BLOCKS, shape=shape, dtype=torch.uint8, name=_NAME)


def pull() -> Finding:
    """Pull; a library that can't do that is wrong, whatever the reason."""
    try:
        with _open("127.0.0.1:0") as owner, _open(None) as node:
            source, target = _cache(owner), _cache(node)
            for tensor in source.tensors:
                tensor.random_()
            order = torch.randperm(_BLOCKS)
            node.connect(owner.address or "").pull(_NAME, target, order, torch.arange(_BLOCKS))
            pairs = zip(source.tensors, target.tensors, strict=True)
            equal = all(torch.equal(theirs[order], mine) for theirs, mine in pairs)
            done = node.stats().recent[-1]
    except (LLMException, OSError) as error:
        return Finding("loopback pull", "wrong", f"failed: {error}")
    if not equal:
        return Finding("loopback pull", "wrong", "the bytes that came are not those that were sent")
    speed = speed_of(done.nbytes, done.took_ns)
    detail = f"{size(done.nbytes)} within this process, bytes compared: {speed}"
    return Finding("loopback pull", "ok", detail)
