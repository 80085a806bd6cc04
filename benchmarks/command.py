# SPDX-License-Identifier: Apache-2.0
"""``python -m llm_datadist_torch bench``: measures the library beside its peers.

Every figure is the median of calls that are made in turn with those of the peers and of the
machine's ceilings, in one run; ratios are the other's time by ours, so that above 1 ours is the
quicker. Bytes are compared before anything is timed. Nothing is measured on a simulated NPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.cases import NotHereError, Plan, benchmarks
from benchmarks.measuring import TINY, Effort
from benchmarks.peers import Peer, all_peers
from llm_datadist_torch.cli.progress import progress_bar

BLOCK_SIZES = ("copy", "swap", "pull", "push", "runs", "hosts")
"""Benchmarks whose axis has a point of 4096 that is small enough to see that they work."""

NEEDS = """\
benchmarks, and the axis of each for --sweep:
  copy, swap   copy_blocks and swap_blocks against torch: bytes of a block
  pull, push   between two processes: bytes of a block
  runs         pulls of scattered blocks of 64 bytes: how many
  hosts        pulls between two network namespaces over veth: bytes of a block
  latency      the same over a wire with a delay: microseconds in each direction
  link         links made at once: how many
  alloc        caches of 80 tensors, and 64 GiB registered: bytes of a tensor
  layerwise    layers sent while the next are computed: how many
what needs what:
  mapping, readv (the ceilings: C loops)   gcc or clang
  hosts, latency                           root, iproute2 and network namespaces
  gloo                                     nothing: torch has it
  nixl                                     pip install "llm_datadist_torch[nixl]"
  mooncake                                 pip install mooncake-transfer-engine-non-cuda,
                                           and of Debian libibverbs1 and libnuma1, without what
                                           they recommend: with RDMA providers, NIXL crashes at exit
  --plot                                   pip install "llm_datadist_torch[plots]"
A peer that is missing is left out, and the JSON says why; one that --against names must be there.
Engines of vLLM are measured from the source tree: python -m benchmarks.bench_vllm.
"""


def parser_of(prog: str) -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=NEEDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*benchmarks(), "all"]
    options = [peer.option for peer in all_peers() if peer.option]
    parser.add_argument("names", nargs="*", choices=names, default="all", metavar="BENCHMARK")
    parser.add_argument("--against", nargs="+", choices=options, metavar="PEER", help=str(options))
    parser.add_argument(
        "--sweep", nargs="+", type=size, default=[], help="points of the axis, such as 4K 64K 1M"
    )
    parser.add_argument("--rounds", type=int, default=11, help="of a point, at most (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="for a point, unless it has not got seven rounds by then (%(default)s)",
    )
    parser.add_argument("--tiny", action="store_true", help="only see that it works: no figures")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="file for a picture, such as out.png")
    return parser


def size(text: str) -> int:
    """A number with K, M or G for powers of 1024."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text)
    if found is None or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 512, 4K or 1M")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def choose(against: Sequence[str] | None) -> tuple[list[Peer], dict[str, str]]:
    """The peers to use, and why the others are left out.

    Raises:
        SystemExit: One was asked for and can't be used.
    """
    chosen, left_out = [], {}
    for peer in all_peers():
        if peer.option and against is not None and peer.option not in against:
            continue
        if not (reason := peer.why_not()):
            chosen.append(peer)
        elif peer.option and against is not None:
            raise SystemExit(f"bench: --against {peer.option}: {reason}")
        else:
            left_out[peer.name] = reason
    return chosen, left_out


def show(point: dict[str, Any]) -> None:
    """A point, a line for each contender."""
    print("  " + ", ".join(f"{name} {value}" for name, value in point["at"].items()))
    for name in point.get("failed", ()):
        print(f"    {name:26} failed, and is left out here")
    ours = [each for each in point["contenders"] if each["role"] == "ours"]
    for each in point["contenders"]:
        rate = f"{each['gb_per_s']:8.2f} GB/s" if "gb_per_s" in each else ""
        ratios = [f"{each['p50_us'] / mine['p50_us']:.2f} of {mine['name']}" for mine in ours]
        compared = "" if each["role"] == "ours" else "  takes " + ", ".join(ratios)
        print(
            f"    {each['name']:26} p50 {each['p50_us']:11.1f} us"
            f"  p99 {each['p99_us']:11.1f} us {rate}{compared}",
            flush=True,
        )


def main(prog: str, arguments: Sequence[str]) -> int:
    """Measure what the arguments say; returns the exit status."""
    parser = parser_of(prog)
    options = parser.parse_args(arguments)
    every = benchmarks()
    names = list(every) if "all" in options.names else list(dict.fromkeys(options.names))
    if options.sweep and len(names) > 1:
        parser.error("--sweep: name one benchmark, because each has another axis")
    peers, left_out = choose(options.against)
    environment = common.environment()
    common.print_environment()
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    effort = TINY if options.tiny else Effort.of(options.rounds, options.seconds)
    sweep = options.sweep or ([4096] if options.tiny else [])
    record: dict[str, Any] = {"environment": environment, "tiny": options.tiny}
    record |= {"left_out": left_out, "benchmarks": {}}
    with progress_bar("benchmarks", len(names)) as done:
        for number, name in enumerate(names, 1):
            print(f"[{number}/{len(names)}] {name}", flush=True)
            asked = sweep if options.sweep or name in BLOCK_SIZES else []
            plan = Plan(peers, asked, effort, options.tiny, show)
            try:
                record["benchmarks"][name] = every[name](plan)
            except NotHereError as reason:
                left_out[name] = str(reason)
                print(f"left out: {name}: {reason}")
            done(number)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        from benchmarks import plots

        plots.draw(record["benchmarks"], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main("python -m benchmarks.command", sys.argv[1:]))
