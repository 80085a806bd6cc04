# SPDX-License-Identifier: Apache-2.0
"""Disaggregated generation: prefill processes read prompts, decode processes write the text.

    python examples/pd_generate.py [PROMPT_FILE] [--prefill N] [--decode M] [--tokens T]

This process is the router of a small serving stack.  It starts the others, gives each request to a
prefill process, and tells a decode process which blocks hold the request's keys and values.  The
decode process pulls those blocks into other blocks of its own cache and continues the text.  At the
end the router generates the same text alone, and the tokens have to be the same; so do the bytes of
the keys and values on both sides.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pd_fleet import ChildFailedError, Event, Fleet, Settings

DEFAULT_PROMPT = Path(__file__).resolve().parent / "prompt.txt"
MAX_POSITIONS = 1024  # as many as the model was trained for
SHOWN_PROMPT_LINES = 4


@dataclass
class Request:
    """One text to be generated, and what becomes of it."""

    number: int
    prompt: bytes
    count: int
    prefill: str
    decode: str
    submitted: float = 0.0
    first_token_s: float = 0.0
    digest: str = ""  # of the keys and values in the prefill process
    bytes_equal: bool = False  # the decode process has the same keys and values
    nbytes: int = 0
    pull_s: float = 0.0
    decode_s: float = 0.0
    made: int = 0  # tokens so far
    tokens: list[int] = field(default_factory=list)


class Router:
    """Takes every request through its stations and shows what happens."""

    def __init__(self, fleet: Fleet, requests: list[Request], started: float) -> None:
        self.fleet = fleet
        self.requests = requests
        self.started = started
        self.clusters: dict[str, int] = {}  # process name -> cluster id

    def say(self, who: str, text: str) -> None:
        """Prints one line of progress."""
        print(f"{time.monotonic() - self.started:7.2f} s  {who:<10} {text}", flush=True)

    def start(self) -> None:
        """Waits until every process has its cache, and links each decode to each prefill."""
        addresses: list[str] = []
        for event in self.fleet.collect("ready", len(self.fleet.names)):
            data = event.data
            self.clusters[event.sender] = data["cluster_id"]
            where = f"pid {data['pid']}"
            # Decode processes listen, too, but nobody connects to them.
            if event.sender.startswith("prefill"):
                addresses.append(data["address"])
                where += f", listens on {data['address']}"
            self.say(
                event.sender,
                f"cluster {data['cluster_id']}: {data['num_blocks']} blocks of "
                f"{data['block_size']} tokens, {data['bytes_per_block'] // 1024} KiB each in "
                f"{data['num_tensors']} tensors on {data['device']}; {where}",
            )
        decoders = [name for name in self.fleet.names if name.startswith("decode")]
        for name in decoders:
            for address in addresses:
                self.fleet.send(name, "link", address)
        for event in self.fleet.collect("linked", len(decoders) * len(addresses)):
            self.say(event.sender, f"linked to cluster {event.data['cluster_id']}")

    def serve(self, show: Callable[[float], None]) -> float:
        """Submits all requests and returns the seconds until the last token of the last one.

        Calls show with the number of tokens that there are.
        """
        began = time.monotonic()
        for request in self.requests:
            request.submitted = time.monotonic()
            job = {"request": request.number, "prompt": list(request.prompt)}
            self.fleet.send(request.prefill, "prefill", job)
        handlers = {
            "prefilled": self.on_prefilled,
            "pulled": self.on_pulled,
            "progress": self.on_progress,
            "done": self.on_done,
        }
        while any(not request.tokens for request in self.requests):
            event = self.fleet.next_event()
            handlers[event.kind](event, self.requests[event.data["request"]])
            show(sum(request.made for request in self.requests))
        return time.monotonic() - began

    def on_prefilled(self, event: Event, request: Request) -> None:
        """Tells the decode process where the request's keys and values are."""
        data = event.data
        request.first_token_s = data["at"] - request.submitted
        request.digest = data["digest"]
        self.say(
            event.sender,
            f"request {request.number}: {data['length']} tokens read in {data['seconds']:.3f} s "
            f"into {len(data['blocks'])} blocks, first token {chr(data['first_token'])!r}",
        )
        job = {key: data[key] for key in ("request", "first_token", "length", "blocks")}
        job |= {"cluster_id": self.clusters[event.sender], "count": request.count}
        self.fleet.send(request.decode, "decode", job)

    def on_pulled(self, event: Event, request: Request) -> None:
        """The decode process has its own copy now: the prefill side may reuse its blocks."""
        data = event.data
        request.nbytes, request.pull_s = data["nbytes"], data["seconds"]
        note = " (the first over this link, which also sets it up)" if data["is_first"] else ""
        request.bytes_equal = data["digest"] == request.digest
        self.fleet.send(request.prefill, "release", request.number)
        self.say(
            event.sender,
            f"request {request.number}: pulled {request.nbytes / 1e6:.2f} MB in "
            f"{request.pull_s * 1e3:.2f} ms, {request.nbytes / request.pull_s / 1e9:.2f} GB/s"
            f"{note}",
        )
        pairs = list(zip(data["src_blocks"], data["dst_blocks"], strict=True))
        shown = "  ".join(f"{src}->{dst}" for src, dst in pairs[:8])
        rest = f"  and {len(pairs) - 8} more" if len(pairs) > 8 else ""
        self.say("", f"  blocks {shown}{rest}")

    def on_progress(self, event: Event, request: Request) -> None:
        """Shows how far a text is."""
        request.made = event.data["tokens"]
        self.say(
            event.sender, f"request {request.number}: {event.data['tokens']}/{request.count} tokens"
        )

    def on_done(self, event: Event, request: Request) -> None:
        """Keeps the finished text."""
        request.tokens, request.decode_s = event.data["tokens"], event.data["seconds"]
        request.made = len(request.tokens)
        self.say(event.sender, f"request {request.number}: done, {len(request.tokens)} tokens")

    def stop(self) -> None:
        """Ends the decode processes, which unlink, and then the prefill processes."""
        for role in ("decode", "prefill"):
            names = [name for name in self.fleet.names if name.startswith(role)]
            for name in names:
                self.fleet.send(name, "stop", None)
            for event in self.fleet.collect("stopped", len(names)):
                self.say(event.sender, "stopped")


def make_requests(prompt: bytes, options: argparse.Namespace) -> list[Request]:
    """Makes request i out of a prefix of the prompt, the last request out of all of it."""
    requests = []
    for i in range(options.requests):
        # From half of the prompt to the whole, cut behind a line where there is one.
        wanted = len(prompt) * (options.requests + i + 1) // (2 * options.requests)
        cut = prompt.rfind(b"\n", 0, wanted) + 1 if i + 1 < options.requests else wanted
        requests.append(
            Request(
                number=i,
                prompt=prompt[: cut or wanted],
                count=options.tokens,
                prefill=f"prefill {i % options.prefill}",
                decode=f"decode {i % options.decode}",
            )
        )
    return requests


def show_text(request: Request) -> None:
    """Prints the end of the prompt and what the model made of it."""
    print(f"\nrequest {request.number}: {request.prefill} -> {request.decode}")
    lines = request.prompt.decode("utf-8", errors="replace").splitlines()[-SHOWN_PROMPT_LINES:]
    # Byte 0 is what stands between two documents in the training text.
    generated = bytes(request.tokens).replace(b"\0", b"\n--\n").decode("utf-8", errors="replace")
    for label, part in (("prompt", lines), ("text", generated.split("\n"))):
        for line in part:
            shown = "".join(c if c.isprintable() else "?" for c in line)
            print(f"  {label:>6} | {shown}".rstrip())


def show_figures(requests: list[Request], seconds: float) -> None:
    """Prints one row per request and the totals."""
    head = f"{'request':>7} {'prompt':>8} {'first token':>12} {'pulled':>10} {'pull':>10} {'':>11}"
    print(f"\n{head} {'decode':>14}")
    for request in requests:
        rate = (len(request.tokens) - 1) / request.decode_s if request.decode_s else 0.0
        print(
            f"{request.number:>7} {len(request.prompt):>6} B {request.first_token_s:>10.3f} s "
            f"{request.nbytes / 1e6:>7.2f} MB {request.pull_s * 1e3:>7.2f} ms "
            f"{request.nbytes / request.pull_s / 1e9:>6.2f} GB/s {rate:>8.1f} tok/s"
        )
    tokens = sum(len(request.tokens) for request in requests)
    nbytes = sum(request.nbytes for request in requests)
    pull_s = sum(request.pull_s for request in requests)
    first = min(request.first_token_s for request in requests)
    print(
        f"\ntogether: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s;  "
        f"{nbytes / 1e6:.2f} MB pulled at {nbytes / pull_s / 1e9:.2f} GB/s;  "
        f"time to first token {first:.3f} s"
    )


def compare(requests: list[Request]) -> bool:
    """Says whether keys and values arrived unchanged, and whether the tokens are the right ones.

    The right ones are those that this process alone generates, which it does here.
    """
    import paged_model as pm
    import torch

    model = pm.load_model()
    longest = max(len(request.prompt) + request.count for request in requests)
    shape = pm.cache_shape(model.config, pm.blocks_for(longest))
    tensors = [torch.zeros(shape) for _ in range(pm.num_tensors(model.config))]
    equal = 0
    for request in requests:
        cache = pm.PagedCache(tensors, pm.BlockAllocator(range(shape[0])))
        expected = pm.generate(model, cache, list(request.prompt), request.count)
        if expected == request.tokens:
            equal += 1
            continue
        pairs = enumerate(zip(expected, request.tokens, strict=True))
        at, (alone, here) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        print(f"request {request.number}, token {at}: {here}, but {alone} in a single process")
    same = sum(request.bytes_equal for request in requests)
    verdict = "bytes equal" if same == len(requests) else "BYTES DIFFER"
    print(f"{verdict}: {same} of {len(requests)} texts have the same SHA-256 over keys and values")
    verdict = "tokens equal" if equal == len(requests) else "TOKENS DIFFER"
    print(f"{verdict}: {equal} of {len(requests)} texts match a single process token for token")
    return equal == same == len(requests)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""

    def positive(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
        return int(text)

    parser = argparse.ArgumentParser(description="Prefill and decode in different processes.")
    parser.add_argument("prompt_file", nargs="?", type=Path, default=DEFAULT_PROMPT)
    parser.add_argument("--prefill", type=positive, default=1, help="prefill processes")
    parser.add_argument("--decode", type=positive, default=1, help="decode processes")
    parser.add_argument("--requests", type=positive, help="default: enough for every process")
    parser.add_argument("--tokens", type=positive, default=256, help="tokens per request")
    parser.add_argument("--blocks", type=positive, default=256, help="blocks per process")
    parser.add_argument(
        "--device",
        choices=("auto", "npu", "cpu"),
        default="auto",
        help="where the models and caches are; auto: on NPUs if there are any",
    )
    parser.add_argument("--timeout", type=positive, default=120, help="seconds for everything")
    parser.add_argument(
        "--damage", action="store_true", help="zero what was pulled: the comparison must fail"
    )
    options = parser.parse_args(arguments)
    options.requests = options.requests or max(options.prefill, options.decode)
    if options.tokens > MAX_POSITIONS // 2:
        parser.error(f"--tokens {options.tokens}: the model can do {MAX_POSITIONS // 2} at most")
    return options


def read_prompt(options: argparse.Namespace) -> bytes:
    """Returns the file, or as much of its end as the model has positions for."""
    # The last line break is the editor's, not the text's.
    prompt: bytes = options.prompt_file.read_bytes().removesuffix(b"\n")
    if len(prompt) < 2 * options.requests:
        raise ValueError(
            f"{options.prompt_file}: {len(prompt)} bytes are too few for "
            f"{options.requests} requests"
        )
    limit = MAX_POSITIONS - options.tokens
    if len(prompt) > limit:
        print(f"{options.prompt_file}: only its last {limit} of {len(prompt)} bytes are used")
    return prompt[-limit:]


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        prompt = read_prompt(options)
    except (OSError, ValueError) as error:
        print(f"pd_generate: {error}", file=sys.stderr)
        return 2
    requests = make_requests(prompt, options)
    started = time.monotonic()
    settings = Settings(
        num_blocks=options.blocks,
        timeout_s=options.timeout,
        num_prefill=options.prefill,
        device=options.device,
        damage=options.damage,
    )
    try:
        with Fleet(options.prefill, options.decode, settings) as fleet:
            router = Router(fleet, requests, started)
            router.say(
                "router",
                f"prompt of {len(prompt)} bytes, from {options.prompt_file.name}; "
                f"{options.tokens} tokens for each of {len(requests)} request(s)",
            )
            router.say("router", f"starting {len(fleet.names)} processes: {', '.join(fleet.names)}")
            # Only needed at the end, but now there is time: the processes are importing it too.
            import paged_model  # noqa: F401

            from llm_datadist_torch.cli.progress import progress_bar

            router.start()
            with progress_bar("tokens", sum(request.count for request in requests)) as show:
                seconds = router.serve(show)
            router.stop()
    except ChildFailedError as error:
        print(f"\npd_generate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for request in requests:
        show_text(request)
    show_figures(requests, seconds)
    return 0 if compare(requests) else 1


if __name__ == "__main__":
    sys.exit(main())
