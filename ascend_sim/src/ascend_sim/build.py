# SPDX-License-Identifier: Apache-2.0
"""Compiles the simulated runtime against the installed torch_npu's headers, once, into a cache.

Nothing here imports torch or torch_npu: without a runtime neither can be imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ascend_sim.environment import environment_text

__all__ = ["SimulatorBuildError", "build"]

SOURCES = Path(__file__).resolve().parent / "csrc"
_FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-DFUNC_VISIBILITY",
    "-Wall",
    "-Wextra",
    "-Wno-deprecated-declarations",
    "-Wno-unused-parameter",
)


# torch_npu and vllm-ascend's extension are linked with these, and need nothing of them but that
# they are there, or what another library of ours has.
_EMPTY = (
    "acl_tdt_channel",
    "ascend_dump",
    "ascendalog",
    "c_sec",
    "error_manager",
    "ge_common_base",
    "ge_runner",
    "graph",
    "mmpa",
    "profapi",
    "register",
    "runtime",
    "unified_dlog",
)
# Folders of csrc/ whose headers those of another may include.
_SHARES = {"atb": ("kernels",)}


class SimulatorBuildError(RuntimeError):
    """The simulator can't be built here; the message says why, and what to do."""


@dataclass(frozen=True)
class _Library:
    """One shared library: its files of csrc/, and how they are compiled and linked."""

    name: str
    patterns: tuple[str, ...]
    compile_flags: tuple[str, ...] = ("-O2",)
    link_flags: tuple[str, ...] = ()
    # Files that stand for libraries of the old C++ ABI.
    old_abi: tuple[str, ...] = ()
    # A header that all of its files include, and that takes most of their time: compiled once.
    common_header: str = ""

    def flags_of(self, source: Path) -> tuple[str, ...]:
        abi = "-D_GLIBCXX_USE_CXX11_ABI=0" if source.name in self.old_abi else ""
        return (*self.compile_flags, *filter(None, (abi,)))

    def sources(self) -> list[Path]:
        return sorted(path for pattern in self.patterns for path in SOURCES.glob(pattern))


@dataclass(frozen=True)
class _Packages:
    """Where the packages are that it is compiled against, and which versions they have."""

    torch: Path
    torch_npu: Path
    versions: tuple[str, str]

    @property
    def acl_include(self) -> Path:
        return self.torch_npu / "include" / "third_party" / "acl" / "inc"


def build() -> Path:
    """Build what isn't in the cache yet; the first time takes about a minute.

    If another process is building it, this one waits for the result.

    Returns:
        The directory with the libraries, for ``LD_LIBRARY_PATH``.

    Raises:
        SimulatorBuildError: torch_npu or g++ is missing, or the compiler failed.
    """
    packages = _find_packages()
    libraries = _libraries(packages)
    cache = _cache_directory()
    target = cache / _key_of(libraries, packages)
    if target.is_dir():
        return target
    compiler = shutil.which(environment_text("CXX") or "g++")
    if compiler is None:
        raise SimulatorBuildError(
            "no C++ compiler: the simulator is compiled on first use; apt-get install g++"
        )
    sys.stderr.write(f"building the simulated Ascend runtime in {cache}, about a minute\n")
    cache.mkdir(parents=True, exist_ok=True)
    with _only_builder(cache):
        if target.is_dir():
            return target
        scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=cache))
        try:
            _compile_all(compiler, libraries, packages, scratch, cache / "objects")
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _only_builder(cache: Path) -> Iterator[None]:
    """Hold the lock of a cache. The kernel releases it when its process ends, however it ends."""
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _find_packages() -> _Packages:
    found = []
    for name in ("torch", "torch_npu"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SimulatorBuildError(
                f"{name} is not installed: the simulator is the runtime below the real torch_npu; "
                "pip install torch_npu (of the same version as torch)"
            )
        found.append(Path(spec.origin).parent)
    versions = importlib.metadata.version("torch"), importlib.metadata.version("torch_npu")
    packages = _Packages(found[0], found[1], versions)
    if not packages.acl_include.is_dir():
        raise SimulatorBuildError(
            f"torch_npu {versions[1]} has no AscendCL headers in {packages.acl_include}; "
            "2.13.0 is the version that the simulator is tested with"
        )
    return packages


def _libraries(packages: _Packages) -> list[_Library]:
    torch_libraries = packages.torch / "lib"
    include = packages.torch / "include"
    api = include / "torch" / "csrc" / "api" / "include"
    kernels = _Library(
        "opapi",
        ("kernels/*.cpp",),
        ("-O1", f"-isystem{include}", f"-isystem{api}"),
        (
            f"-L{torch_libraries}",
            f"-Wl,-rpath,{torch_libraries}",
            "-ltorch_cpu",
            "-lc10",
            "-lascendcl",
        ),
        common_header="kernels/kernel.h",
    )
    atb = replace(
        kernels,
        name="atb",
        patterns=("atb/*.cpp",),
        # $ORIGIN: activate() loads the libraries one by one, in the order of their names.
        link_flags=(*kernels.link_flags, "-Wl,-rpath,$ORIGIN", "-lopapi"),
    )
    empty = [_Library(name, ("stubs/empty.cpp",)) for name in _EMPTY]
    return [
        _Library("ascendcl", ("runtime/*.cpp",), link_flags=("-lpthread",)),
        _Library(
            "cann_hixl",
            ("hixl/*.cpp",),
            ("-O1",),
            link_flags=("-lascendcl", "-lpthread"),
            old_abi=("string.cpp",),
        ),
        _Library("acl_op_compiler", ("stubs/acl_op_compiler.cpp",)),
        _Library("hccl", ("stubs/hccl.cpp",)),
        _Library("platform", ("stubs/platform.cpp",), old_abi=("platform.cpp",)),
        *empty,
        kernels,
        atb,
    ]


def _cache_directory() -> Path:
    chosen = environment_text("ASCEND_SIM_CACHE")
    if chosen:
        return Path(chosen).absolute()
    home = environment_text("XDG_CACHE_HOME")
    base = Path(home) if home else Path.home() / ".cache"
    return base / "ascend-sim"


def _digest(parts: Sequence[bytes | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def _headers(folder: Path) -> list[bytes]:
    """The headers that a file of a folder of csrc/ may include: that folder's and the shared."""
    folders = [SOURCES, folder, *(SOURCES / name for name in _SHARES.get(folder.name, ()))]
    return [path.read_bytes() for place in folders for path in sorted(place.glob("*.h"))]


def _key_of(libraries: Sequence[_Library], packages: _Packages) -> str:
    parts: list[bytes | str] = [*packages.versions, str(packages.torch), *_FLAGS]
    for library in libraries:
        parts += [library.name, *library.compile_flags, *library.link_flags, *library.old_abi]
        for path in library.sources():
            parts += [path.name, path.read_bytes(), *_headers(path.parent)]
    return _digest(parts)


def _compile_all(
    compiler: str,
    libraries: Sequence[_Library],
    packages: _Packages,
    out: Path,
    objects: Path,
) -> None:
    objects.mkdir(exist_ok=True)
    # The libraries that others are linked with come first.
    flags = (*_FLAGS, f"-isystem{packages.acl_include}")
    with (
        tempfile.TemporaryDirectory(dir=objects) as scratch,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        precompiled = _PrecompiledHeaders(compiler, Path(scratch))
        compile_one = partial(_compile, compiler, precompiled, objects, packages)
        made = [
            [
                pool.submit(
                    compile_one, library.common_header, path, (*flags, *library.flags_of(path))
                )
                for path in library.sources()
            ]
            for library in libraries
        ]
        for _ in _shown([part for parts in made for part in parts]):
            pass
        for library, parts in zip(libraries, made, strict=True):
            files = [str(part.result()) for part in parts]
            name = f"lib{library.name}.so"
            link = ["-shared", "-o", str(out / name), *files, f"-Wl,-soname,{name}", f"-L{out}"]
            _run([compiler, *link, *library.link_flags])


def _shown(parts: list[Future[Path]]) -> Iterable[Future[Path]]:
    """The parts as they end, with a progress bar on a terminal where ``rich`` is installed."""
    ended = as_completed(parts)
    if not sys.stderr.isatty():
        return ended
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return ended
    console = Console(stderr=True)
    return track(ended, "compiling", len(parts), console=console, transient=True)


class _PrecompiledHeaders:
    """Headers, compiled when the first file that includes one is."""

    def __init__(self, compiler: str, folder: Path) -> None:
        self._compiler = compiler
        self._folder = folder
        self._lock = threading.Lock()

    def flags_for(self, header: str, flags: Sequence[str]) -> tuple[str, ...]:
        """The flags by which a file that is compiled with `flags` uses a header of csrc/."""
        if not header:
            return ()
        wrapper = self._folder / f"{_digest([header, *flags])}.h"
        made = wrapper.with_name(f"{wrapper.name}.gch")
        with self._lock:
            if not made.exists():
                wrapper.write_text(f'#include "{SOURCES / header}"\n', encoding="utf-8")
                self._compile(wrapper, made, flags)
        return ("-include", str(wrapper))

    def _compile(self, wrapper: Path, made: Path, flags: Sequence[str]) -> None:
        command = [self._compiler, *flags, "-x", "c++-header", str(wrapper), "-o", str(made)]
        _run(command)


def _compile(
    compiler: str,
    precompiled: _PrecompiledHeaders,
    objects: Path,
    packages: _Packages,
    common_header: str,
    source: Path,
    flags: Sequence[str],
) -> Path:
    """Compiles one file, unless it was compiled before: while developing, few files change."""
    key = _digest([source.read_bytes(), *flags, *packages.versions, *_headers(source.parent)])
    made = objects / f"{source.stem}-{key}.o"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=objects) as scratch:
            fresh = Path(scratch) / "made.o"
            common = precompiled.flags_for(common_header, flags)
            _run([compiler, *flags, *common, "-c", str(source), "-o", str(fresh)])
            fresh.rename(made)
    return made


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SimulatorBuildError(
            f"building the simulator failed: {' '.join(command)}\n{done.stderr[-8000:]}"
        )
