# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's model: a small byte-level Llama on the documentation inside Python itself.

The text is what every machine with Python has: the docstrings of the standard library's modules,
and the language reference that ``help()`` shows (``pydoc_data.topics``).  A token is a byte, so
there is no tokenizer; byte 0 stands between two documents.

    python examples/model/train.py --minutes 23

The seed is fixed and there is one thread, so every run sees the same batches.  ``--minutes``
shortens the schedule to what the machine can do in that time, and then the result depends on its
speed: the weights beside this file are from 2801 of the 3000 steps, on one core of a busy machine,
and need 1.65 bits per byte on held-out text.  Needs torch 2.9 or later, for its Muon.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SEPARATOR = b"\0"
TOKENS_PER_STEP = 2048
SHORT, LONG = 256, 1024  # training windows, in bytes: short ones first, they are cheaper
LONG_SHARE = 0.3  # the last part of the schedule, which teaches positions beyond SHORT
HELD_OUT_BYTES = 48 * LONG
SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


def docstrings(path: Path) -> Iterator[str]:
    """Yields the docstrings of one source file; the string values of a table in pydoc_data."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, owners):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield text
        elif isinstance(node, ast.Dict) and path.parent.name == "pydoc_data":
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield inspect.cleandoc(value.value)


def documents() -> list[bytes]:
    """Collects every distinct ASCII document of at least 60 bytes, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[bytes, None] = {}
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED.intersection(path.relative_to(root).parts):
            for text in docstrings(path):
                if len(text) >= 60 and text.isascii():
                    found[text.encode("ascii")] = None
    # A hash as the sort key mixes short and long ones without any random state.
    return sorted(found, key=lambda text: hashlib.sha256(text).digest())


def split_corpus(documents: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the documents into two byte streams, (training, held out), int64 [n] each."""
    held_out: list[bytes] = []
    rest = list(documents)
    while sum(map(len, held_out)) < HELD_OUT_BYTES:
        held_out.append(rest.pop())
    streams = [SEPARATOR.join(part) + SEPARATOR for part in (rest, held_out)]
    training, held = (torch.frombuffer(bytearray(s), dtype=torch.uint8).long() for s in streams)
    return training, held[:HELD_OUT_BYTES]


def new_model() -> LlamaForCausalLM:
    """Builds the untrained model: 1.6 M parameters, embeddings tied, grouped-query attention."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, stream: torch.Tensor, window: int) -> float:
    """Measures the mean loss over the whole stream, cut into windows of `window` bytes."""
    model.eval()
    windows = stream[: stream.numel() // window * window].view(-1, window)
    nats = sum(
        model(input_ids=batch, labels=batch).loss.item() * batch.shape[0]
        for batch in windows.split(8)
    )
    model.train()
    return nats / windows.shape[0] / math.log(2)


def learning_rate(progress: float, peak: float) -> float:
    """Warms up over the first 2 % and then follows a cosine down to zero at progress 1."""
    warm = min(1.0, progress / 0.02 + 1e-3)
    return peak * warm * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for the embedding and the norms.

    Both take the same learning rate, because Muon's update is scaled to the size of AdamW's.
    """
    named = list(model.model.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and name.startswith("layers.")]
    outer = [p for _, p in named if all(p is not q for q in inner)]
    return [
        torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.95), weight_decay=0.05),
        torch.optim.Muon(
            inner, lr=peak, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
    ]


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Writes config.json and model.safetensors, weights in half precision."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float16
    model.config.save_pretrained(out)
    # The output matrix is the embedding, so it isn't stored.
    weights = {
        name: value.to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    file = out / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # it is created for its owner alone


def train(options: argparse.Namespace) -> None:
    """Runs the schedule and leaves the checkpoint with the lowest held-out loss in `--out`."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    training, held_out = split_corpus(documents())
    print(f"{training.numel():,} training bytes, {held_out.numel():,} held out", flush=True)
    model = new_model()
    print(f"{model.num_parameters():,} parameters", flush=True)
    steppers = optimizers(model, options.lr)
    best, started = math.inf, time.monotonic()
    for step in range(options.steps + 1):
        minutes = (time.monotonic() - started) / 60
        progress = max(step / options.steps, minutes / options.minutes)
        last = progress >= 1.0
        if step and (last or step % options.every == 0):
            bits = bits_per_byte(model, held_out, LONG if progress > 1 - LONG_SHARE else SHORT)
            print(f"step {step:5d}  {minutes:5.1f} min  held out {bits:.4f} bits/byte", flush=True)
            if progress > 1 - LONG_SHARE and bits < best:
                best = bits
                save(model, options.out)
        if last:
            break
        window = LONG if progress > 1 - LONG_SHARE else SHORT
        starts = torch.randint(
            training.numel() - window, (TOKENS_PER_STEP // window,), generator=generator
        )
        batch = training[starts[:, None] + torch.arange(window)]
        for group in (group for stepper in steppers for group in stepper.param_groups):
            group["lr"] = learning_rate(progress, options.lr)
        # bfloat16 products roughly halve the time where the processor has them.
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        model.zero_grad(set_to_none=True)
    print(f"best held-out loss at {LONG} bytes of context: {best:.4f} bits per byte", flush=True)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the schedule early")
    parser.add_argument("--every", type=int, default=100, help="steps between two evaluations")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
