# SPDX-License-Identifier: Apache-2.0
"""The commands of ``python -m llm_datadist_torch``: run, sim, bench, top, doctor...

Only what a command needs is imported: ``sim`` must not import torch, ``doctor`` decides how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_datadist_torch.cli import facts, report, run, sim
from llm_datadist_torch.compat.switch import ShimConflictError, shim_path
from llm_datadist_torch.values.environment import environment_text, set_environment
from llm_datadist_torch.values.loading import load_extension
from llm_datadist_torch.values.status import LLMLoadError

PROG = "python -m llm_datadist_torch"
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def main(arguments: Sequence[str]) -> int:
    """Carry out one command.

    Returns:
        The exit status. A program that ``run`` runs leaves by its own exceptions, and ``sim``
        becomes the command.
    """
    if "sim" in arguments[:1]:
        return sim.run(f"{PROG} sim", arguments[1:])
    if "bench" in arguments[:1]:
        from llm_datadist_torch.cli import bench

        return bench.run(f"{PROG} bench", arguments[1:])
    parser = _parser()
    ours, theirs = run.split(arguments)
    options = parser.parse_args(ours)
    if options.command == "run":
        if not theirs:
            parser.error("run: no program given")
        try:
            run.prepare(theirs, force=options.force, is_module=options.module)
        except ShimConflictError as error:
            parser.exit(2, f"{PROG} run: {error}; --force replaces it for this program\n")
        return run.run(theirs, is_module=options.module)
    if options.command == "shim-path":
        sys.stdout.write(shim_path(force=options.force) + "\n")
        return 0
    if options.command == "top":
        from llm_datadist_torch.cli import top

        return top.run(options.address, options.interval, options.count)
    found = _examine(options.peer or options.address)
    if options.npu_selftest is not None:
        from llm_datadist_torch.cli import selftest

        return selftest.run(found, options.npu_selftest)
    shown = report.as_json if options.json else report.as_text
    sys.stdout.write(report.as_fixes(found) if options.fix else shown(found))
    return found.exit_status


def _examine(address: str | None) -> report.Report:
    """Doctor explains a torch_npu that can't be loaded, so torch must not try to load it."""
    wanted = environment_text(_AUTOLOAD)
    set_environment({_AUTOLOAD: "0"})
    try:
        load_extension()
        from llm_datadist_torch.cli import doctor
    except LLMLoadError as error:
        return report.of_load_error(error)
    finally:
        set_environment({_AUTOLOAD: wanted or None})
    return doctor.examine(address)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    parser.add_argument(
        "--version", action=facts.ShowVersion, nargs=0, help="print the version and build facts"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "run a program, unchanged, in which `import llm_datadist` means this library"
    command = commands.add_parser(
        "run",
        help=text,
        description=text,
        usage=f"{PROG} run [-h] [--force] (PROGRAM.py | -m MODULE) [ARGUMENTS ...]",
    )
    command.add_argument(
        "-m", dest="module", action="store_true", help="run a module, as python -m"
    )
    _add_force(command)
    text = "run a command on simulated NPUs: torch_npu over host memory, not for figures"
    # Only listed here: its options and its help are ascend-sim's.
    commands.add_parser("sim", help=text)
    text = "measure this library beside its peers, on this machine; bench --help says what there is"
    commands.add_parser("bench", help=text)  # listed here; its options are benchmarks/command.py's
    text = "print the directory that does the same on PYTHONPATH"
    _add_force(commands.add_parser("shim-path", help=text, description=text))
    text = "show what a remote instance does, live: links, transfers, caches (needs rich)"
    command = commands.add_parser("top", help=text, description=text)
    command.add_argument("address", help="host:port of the instance")
    command.add_argument("--interval", type=float, default=1.0, help="seconds (%(default)s)")
    command.add_argument("--count", type=int, help="looks; without it until Ctrl-C")
    text = (
        "say what works on this machine, and why the rest doesn't; status 1 if something is wrong,"
        " 2 for wrong arguments, 3 if an instance that is to be examined can't be"
    )
    command = commands.add_parser("doctor", help=text, description=text)
    forms = command.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print JSON, for a report of an error")
    forms.add_argument(
        "--fix", action="store_true", help="print commands that mend what can be mended; runs none"
    )
    forms.add_argument(
        "--npu-selftest",
        nargs="?",
        type=Path,
        const=Path("llm_datadist_selftest.json"),
        metavar="FILE",
        help="also try the NPUs step by step, some minutes, and write a report (%(const)s)",
    )
    text = (
        "also examine the instance that listens there, from both ends of a link: versions, clock,"
        " secret, transports, ports, latency, bandwidth, its links and caches"
    )
    peers = command.add_mutually_exclusive_group()
    peers.add_argument("--peer", metavar="HOST:PORT", help=text)
    peers.add_argument("address", nargs="?", help="the same as --peer")
    return parser


def _add_force(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--force", action="store_true", help="replace a package llm_datadist that is installed"
    )
