# SPDX-License-Identifier: Apache-2.0
"""Lets a CUDA build of torch load where no CUDA is installed: makes empty libraries of those names.

Nothing of them is ever called on a machine without a GPU. Give the folder to the loader:

    python scripts/make_cuda_stubs.py --python VENV/bin/python --out VENV/cuda-stubs
    LD_LIBRARY_PATH=VENV/cuda-stubs VENV/bin/python ...
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

NEEDED = re.compile(r"\(NEEDED\).*\[(.+)\]")
# What a system has, and what torch brings itself, is not CUDA's.
CUDA = re.compile(r"lib(cu|nv|nccl)")
CUDA_FUNCTION = re.compile(r"(cu|nv|nccl)[A-Za-z]")


def needed_by(library: Path) -> set[str]:
    """The libraries that the loader looks for when it loads `library`."""
    done = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return set(NEEDED.findall(done.stdout))


def symbols_wanted(libraries: list[Path], missing: set[str]) -> dict[str, dict[str, set[str]]]:
    """What `libraries` expect of each missing one: symbols, by the version that they carry.

    The loader wants a version to be there, and some symbols (those whose address is taken) at once.
    """
    wanted: dict[str, dict[str, set[str]]] = {name: {} for name in missing}
    without_version: set[str] = set()
    for library in libraries:
        owner_of: dict[str, str] = {}
        current = ""  # versions that the library has itself, which are listed first, are of no file
        for line in lines_of("-V", library):
            file, name = re.search(r"File: (\S+)", line), re.search(r"Name: (\S+)", line)
            if file:
                current = file.group(1)
            elif name and current in wanted:
                owner_of[name.group(1)] = current
                wanted[current].setdefault(name.group(1), set())
        for line in lines_of("--dyn-syms", library):
            symbol = re.search(r" UND (\w+)(?:@+(\S+))?", line)
            if symbol and symbol.group(2) in owner_of:
                wanted[owner_of[symbol.group(2)]][symbol.group(2)].add(symbol.group(1))
            elif symbol and symbol.group(2) is None and CUDA_FUNCTION.match(symbol.group(1)):
                without_version.add(symbol.group(1))
    # Of libraries without versions it is not known whose a symbol is, so each has all of them.
    for versions in wanted.values():
        if not versions:
            versions[""] = without_version
    return wanted


def lines_of(option: str, library: Path) -> list[str]:
    """What readelf says."""
    command = ["readelf", "-W", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def make_stub(out: Path, name: str, versions: dict[str, set[str]]) -> None:
    """A shared library `name` whose functions, of these versions, do nothing."""
    with tempfile.TemporaryDirectory() as folder:
        script, source = Path(folder) / "versions", Path(folder) / "stub.c"
        nodes = [
            f"{version} {{ global: {' '.join(f'{symbol};' for symbol in sorted(symbols))} }};\n"
            if symbols
            else f"{version} {{ }};\n"
            for version, symbols in sorted(versions.items())
            if version
        ]
        script.write_text("".join(nodes))
        everything = sorted(set().union(*versions.values())) if versions else []
        source.write_text(
            "".join(f"int {symbol}(void) {{ return 999; }}\n" for symbol in everything)
        )
        options = [f"-Wl,--version-script={script}"] if nodes else []
        subprocess.run(
            [
                *("gcc", "-shared", "-fPIC", "-fno-builtin", "-nostdlib", f"-Wl,-soname,{name}"),
                *(*options, str(source), "-o", str(out / name)),
            ],
            check=True,
        )


def main() -> None:
    """Make the stubs that the torch of an interpreter needs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="the interpreter that has torch")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    find = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    where = subprocess.run(
        [arguments.python, "-c", find], capture_output=True, text=True, check=True
    )
    libraries = sorted((Path(where.stdout.strip()) / "lib").glob("*.so*"))
    have = {library.name for library in libraries}
    missing = {
        name
        for library in libraries
        for name in needed_by(library)
        if name not in have and CUDA.match(name)
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, versions in symbols_wanted(libraries, missing).items():
        make_stub(arguments.out, name, versions)
    print(f"{len(missing)} empty libraries in {arguments.out}")


if __name__ == "__main__":
    main()
