# SPDX-License-Identifier: Apache-2.0
"""Builds the sdist, and of it a wheel per architecture for manylinux 2.28 and CPython from 3.10 on.

The compiler is Clang as the package ``ziglang`` ships it: it links against any glibc back to the
one that is asked for, and for other architectures. ``_C`` gets Clang's own C++ library linked in,
so it needs nothing of a machine but glibc; no C++ object crosses its border. ``_hixl`` hands CANN
containers of libstdc++, so it is compiled with the headers of the architecture's g++, of which only
the headers and the names in libstdc++.so are used, and needs the machine's libstdc++, GCC 8's or
newer.

    python scripts/build_wheel.py --out dist x86_64 aarch64

The same commit and tools make the same bytes: times in the archives are the commit's.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLIBC = "2.28"  # of RHEL 8, Kylin V10 and openEuler 20.03
ARCHITECTURES = ("x86_64", "aarch64")
# CPython's headers define some macros anew that Zig's glibc has.
QUIET = "-Wno-unused-command-line-argument -Wno-macro-redefined"


def output_of(*command: str, merge: bool = False) -> str:
    """What a command prints."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merge else None,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def commit() -> tuple[str, str]:
    """The commit that is built, "" where this is no checkout, and its time in seconds."""
    if not (ROOT / ".git").exists():
        return "", str(int((ROOT / "pyproject.toml").stat().st_mtime))
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    name = output_of("git", "rev-parse", "HEAD") + ("-changed" if changed else "")
    return name, output_of("git", "log", "-1", "--format=%ct")


def gxx_of(arch: str) -> str:
    """The g++ of an architecture, whose libstdc++ is used."""
    name = f"{arch}-linux-gnu-g++"
    if shutil.which(name) is None:
        raise SystemExit(
            f"{name} is missing: apt-get install g++-{arch.replace('_', '-')}-linux-gnu"
        )
    return name


def libstdcxx(gxx: str) -> dict[str, str]:
    """Options with which Clang takes the libstdc++ of a g++ instead of its own C++ library."""
    said = output_of(gxx, "-E", "-x", "c++", "-", "-v", merge=True)
    listed = said.partition("#include <...> search starts here:")[2].partition("End of search")[0]
    # Before those of C, which the compiler brings: so -I and not -isystem.
    headers = [f"-I{line.strip()}" for line in listed.splitlines() if "c++" in line]
    libraries = [
        output_of(gxx, f"-print-file-name={name}") for name in ("libstdc++.so.6", "libgcc_s.so.1")
    ]
    return {
        "LIBSTDCXX_COMPILE": shlex.join(["-nostdinc++", *headers]),
        "LIBSTDCXX_LINK": shlex.join(["-nostdlib++", *libraries]),
    }


def compiler(folder: Path, arch: str) -> str:
    """A program that compiles and links C++ for `arch` and that glibc."""
    program = folder / "c++"
    command = f"{shlex.quote(sys.executable)} -m ziglang c++ -target {arch}-linux-gnu.{GLIBC}"
    program.write_text(f'#!/bin/sh\nexec {command} {QUIET} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def build_sdist(out: Path, environment: dict[str, str]) -> Path:
    """Write the sdist, which the wheels are made of, so that it is seen to be whole."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out)]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL
    )
    return max(out.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)


def build_wheel(sdist: Path, arch: str, out: Path, environment: dict[str, str]) -> None:
    """Write the wheel of one architecture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = (path for path in folder.iterdir() if path.is_dir())
        program = compiler(folder, arch)
        tag = f"manylinux_{GLIBC.replace('.', '_')}_{arch}"
        options = (f"--config-setting=--build-option=--plat-name={tag}",)
        variables = {
            **environment,
            **libstdcxx(gxx_of(arch)),
            "CC": program,
            "CXX": program,
            "LDSHARED": f"{program} -shared -s",
            "LDCXXSHARED": f"{program} -shared -s",
            "_PYTHON_HOST_PLATFORM": f"linux-{arch}",
        }
        command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", *options]
        subprocess.run(
            [*command, "--outdir", str(out), str(source)],
            env=os.environ | variables,
            check=True,
            stdout=subprocess.DEVNULL,
        )


def main() -> None:
    """Build what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    name, seconds = commit()
    environment = {"BUILD_COMMIT": name, "SOURCE_DATE_EPOCH": seconds}
    sdist = build_sdist(out, environment)
    print(f"{sdist.name}: {sdist.stat().st_size:,} bytes", flush=True)
    for arch in arguments.archs:
        print(f"building the wheel for {arch}", flush=True)
        build_wheel(sdist, arch, out, environment)


if __name__ == "__main__":
    main()
