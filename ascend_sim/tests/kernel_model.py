# SPDX-License-Identifier: Apache-2.0
"""Runs under the simulator: the demo's model on the CPU and on `npu:0`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import paged_model as pm

TOKENS = 24
PROMPT = list((pm.MODEL_DIR.parent / "prompt.txt").read_bytes()[:200])


@torch.inference_mode()
def logits_on(model: torch.nn.Module, device: str) -> torch.Tensor:
    """Returns the logits of the whole prompt."""
    return model.to(device)(torch.tensor([PROMPT], device=device)).logits.float().cpu()


def generate_on(model: torch.nn.Module, device: str) -> list[int]:
    """Returns the greedy tokens after the prompt."""
    ids = torch.tensor([PROMPT], device=device)
    made = model.to(device).generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return made[0, len(PROMPT) :].tolist()


def generate_paged(model: torch.nn.Module, device: str) -> list[int]:
    """Returns the same tokens, made with keys and values in the blocks of a cache."""
    with torch.device(device):
        shape = pm.cache_shape(model.config, num_blocks=20)
        tensors = [torch.zeros(shape) for _ in range(pm.num_tensors(model.config))]
        cache = pm.PagedCache(tensors, pm.BlockAllocator(reversed(range(20))))
        return pm.generate(model.to(device), cache, PROMPT, TOKENS)


def main() -> None:
    """Prints one JSON object."""
    model = pm.load_model()
    logits = {device: logits_on(model, device) for device in ("cpu", "npu:0")}
    tokens = {device: generate_on(model, device) for device in ("cpu", "npu:0")}
    paged = generate_paged(model, "npu:0")
    half = model.to("cpu").to(torch.float16)
    report = {
        "difference": (logits["cpu"] - logits["npu:0"]).abs().max().item(),
        "half_difference": (logits["cpu"] - logits_on(half, "npu:0")).abs().max().item(),
        "cpu": tokens["cpu"],
        "npu": tokens["npu:0"],
        "paged_npu": paged,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
