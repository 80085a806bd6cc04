# SPDX-License-Identifier: Apache-2.0
"""The other process of notebook 02: it reads prompts into the blocks of its cache."""

from __future__ import annotations

import random
import sys
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paged_model as pm

import llm_datadist_torch as ld

BLOCKS = 32


def serve(pipe: Connection) -> None:
    """Answers each prompt by its blocks, and keeps them until the next message comes.

    Args:
        pipe: prompts come here, lists of tokens; None ends the process.
    """
    with ld.open(listen="127.0.0.1:0") as node:
        config = pm.load_config()
        cache = node.allocate(
            layers=config.num_hidden_layers, blocks=BLOCKS, shape=pm.block_shape(config), name="kv"
        )
        model = pm.load_model(device=cache.device)
        order = list(range(BLOCKS))
        random.Random(1).shuffle(order)  # in a service that has run for a while they are mixed
        allocator = pm.BlockAllocator(order)
        pipe.send(node.address)
        while (prompt := pipe.recv()) is not None:
            kv = pm.PagedCache(cache.tensors, allocator)
            # To read the first token, prefill waits for the device: the blocks are written.
            first = pm.prefill(model, kv, prompt)
            pipe.send({"first_token": first, "blocks": kv.blocks, "digest": kv.digest()})
            pipe.recv()  # "pulled"
            kv.release()
