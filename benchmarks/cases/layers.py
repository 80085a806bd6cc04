# SPDX-License-Identifier: Apache-2.0
"""How much of a transfer hides behind the computing of a prompt, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch.nn import functional

import llm_datadist_torch as ld
from benchmarks.cases import Plan
from benchmarks.measuring import contender, figures, measure, point
from benchmarks.owner import TIMEOUT_S, Owner, memory_of
from benchmarks.peers import Memory, Shape

HEADS, HEAD_DIM = 8, 64
HIDDEN = HEADS * HEAD_DIM
TOKENS_PER_BLOCK = 16
LAYERS = (8, 32)
TOKENS = 512
BLOCK_BYTES = TOKENS_PER_BLOCK * HIDDEN * 4


def layerwise(plan: Plan) -> list[dict[str, Any]]:
    """Numbers of layers. The KV is of float32, two tensors for each layer."""
    points = []
    tokens = TOKENS_PER_BLOCK if plan.tiny else TOKENS
    with closing(Owner()) as owner, ld.open(timeout_s=TIMEOUT_S) as node:
        for count in plan.sweep or ((2,) if plan.tiny else LAYERS):
            shape = Shape(BLOCK_BYTES, 1, 2 * count, tokens // TOKENS_PER_BLOCK)
            points.append(measure_one(plan, owner, node, shape, tokens))
            plan.show(points[-1])
    return points


class Model:
    """Layers of a transformer with random weights, on one thread: a prompt's forward pass."""

    def __init__(self, memory: Memory, tokens: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weights = torch.randn(12, HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
        self.prompt = torch.randn(1, tokens, HIDDEN, generator=generator)
        blocks = tokens // TOKENS_PER_BLOCK
        views = [tensor[:blocks].view(torch.float32) for tensor in memory.allocated.tensors]
        self.kv = list(zip(views[::2], views[1::2], strict=True))

    def forward(self, ready: Callable[[int], None] = lambda _: None) -> None:
        """Compute all layers; `ready` is called after each one's KV is written."""
        x = self.prompt
        for number, (k_blocks, v_blocks) in enumerate(self.kv):
            q, k, v = (
                (x @ self.weights[n]).view(1, -1, HEADS, HEAD_DIM).transpose(1, 2) for n in range(3)
            )
            for out, states in ((k_blocks, k), (v_blocks, v)):
                out.copy_(states.transpose(1, 2).reshape(out.shape))
            ready(number)
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = functional.layer_norm(
                x + attended.transpose(1, 2).reshape(x.shape) @ self.weights[3], (HIDDEN,)
            )
            for n in range(4, 8):
                x = x + functional.gelu(x @ self.weights[n]) @ self.weights[n + 4]


def measure_one(
    plan: Plan, owner: Owner, node: ld.Node, shape: Shape, tokens: int
) -> dict[str, Any]:
    """One number of layers."""
    ids = list(range(shape.blocks))
    threads = torch.get_num_threads()
    with (
        owner.serving(shape, ["allocated"]) as offers,
        memory_of(node, shape, owner=False) as memory,
    ):
        peer, model = node.connect(offers["allocated"]), Model(memory, tokens)
        cache = node.register(memory.allocated.tensors, tensors_per_layer=2)

        def serial() -> None:
            model.forward()
            peer.push("allocated", cache, ids, ids)

        def layer_by_layer() -> None:
            with peer.push_layers("allocated", cache, ids, ids) as push:
                model.forward(push.ready)

        calls = {
            "layer by layer": layer_by_layer,
            "computed, then pushed": serial,
            "computed only": model.forward,
            "pushed only": lambda: peer.push("allocated", cache, ids, ids),
        }
        torch.set_num_threads(1)
        try:
            taken = measure(calls, plan.effort, [owner.pid])
        finally:
            torch.set_num_threads(threads)
            node.free(cache)
    roles = {"layer by layer": "ours", "computed only": "ceiling"}
    found = {name: figures(taken[name], shape.nbytes) for name in calls}
    contenders = [
        contender(
            name,
            roles.get(name, "peer"),
            found[name],
            ("computed, then pushed",) if name == "layer by layer" else (),
            "computed only" if name == "layer by layer" else "",
        )
        for name in calls
    ]
    layered, serial_us, computed = (found[name]["p50_us"] for name in list(calls)[:3])
    hidden = (serial_us - layered) / (serial_us - computed) if serial_us > computed else None
    place = {"layers": shape.tensors // 2, "tokens": tokens}
    rounds = len(taken["layer by layer"].seconds)
    return point(
        place, contenders, bytes=shape.nbytes, rounds=rounds, further={"hidden_share": hidden}
    )
