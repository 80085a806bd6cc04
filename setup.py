# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ extension, and a library apart for HIXL; everything static is in pyproject.toml.

The extension needs CPython's headers and a C++17 compiler, and nothing of torch: it is built for
CPython's limited API, and tensors reach it by DLPack. One build serves every torch and Python.

Flags, each "1" or absent, all off by default and echoed when on:

* ``DEBUG=1``     no optimisation, debug symbols
* ``SANITIZE=1``  AddressSanitizer and UndefinedBehaviorSanitizer (see scripts/test_sanitize.sh)
* ``COVERAGE=1``  gcov instrumentation

``LIBSTDCXX_COMPILE`` and ``LIBSTDCXX_LINK`` are options with which a compiler that has a C++
library of its own takes libstdc++ instead: the library for HIXL hands CANN containers of libstdc++
(scripts/build_wheel.py sets them). ``BUILD_COMMIT`` is what ``--version`` shows as the commit.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION_FILE = ROOT / "llm_datadist_torch" / "values" / "version.py"
# What `python -m llm_datadist_torch bench` runs. The other benchmarks are for the source tree.
BENCHMARKS = (
    "__init__",
    "command",
    "common",
    "hosts",
    "measuring",
    "owner",
    "plots",
    "bench_links",
)
BENCHMARK_FOLDERS = ("cases", "peers")
# Includes CPython's headers and most of the C++ library's that any file needs.
COMMON_HEADER = ROOT / "csrc" / "binding_class.h"
# From so many files on it takes less time to precompile that.
MANY_FILES = 6


def flag_enabled(name: str) -> bool:
    """True if the environment asks for build flag `name`; says so."""
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r} is neither 0 nor 1")
    if value == "1":
        print(f"llm_datadist_torch: building with {name}=1")
    return value == "1"


def compiler_flags() -> tuple[list[str], list[str]]:
    """The flags for the compiler and for the linker."""
    compile_args = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    compile_args += ["-Wno-missing-field-initializers", "-fvisibility=hidden"]
    link_args = ["-ldl", "-lpthread"]
    optimise = ["-O3", "-g0"]
    if flag_enabled("DEBUG"):
        optimise = ["-O0", "-g"]
    if flag_enabled("SANITIZE"):
        optimise = ["-O1", "-g"]
        sanitizers = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
        compile_args += [*sanitizers, "-fno-sanitize-recover=undefined"]
        link_args += sanitizers
    if flag_enabled("COVERAGE"):
        optimise = ["-O0", "-g"]
        compile_args += ["--coverage"]
        link_args += ["--coverage"]
    return compile_args + optimise, link_args


def build_facts() -> list[tuple[str, str | None]]:
    """What the extension is told of its build, for ``python -m llm_datadist_torch --version``."""
    found = re.search(r'^VERSION = "(.+)"$', VERSION_FILE.read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{VERSION_FILE} has no line VERSION = ...")
    facts = {"LLMDD_VERSION": found[1], "LLMDD_COMMIT": os.environ.get("BUILD_COMMIT", "")}
    return [(name, f'"{value}"') for name, value in facts.items()]


def extension() -> Extension:
    """The extension `llm_datadist_torch._C`: every file of csrc/."""
    compile_args, link_args = compiler_flags()
    return Extension(
        name="llm_datadist_torch._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
        depends=[
            *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
            "csrc/exports.map",
            str(VERSION_FILE.relative_to(ROOT)),
        ],
        define_macros=[("Py_LIMITED_API", "0x030A0000"), *build_facts()],
        py_limited_api=True,
        extra_compile_args=compile_args,
        extra_link_args=[*link_args, "-Wl,--version-script=csrc/exports.map"],
        language="c++",
    )


def hixl_library() -> Extension:
    """The library `_hixl`, no module of Python's: what calls CANN's HIXL, where that is there."""
    compile_args, link_args = compiler_flags()
    folder = ROOT / "csrc" / "hixl"
    return Extension(
        name="llm_datadist_torch._hixl",
        sources=sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.h")),
        language="c++",
        extra_compile_args=[*compile_args, *shlex.split(os.environ.get("LIBSTDCXX_COMPILE", ""))],
        extra_link_args=[*shlex.split(os.environ.get("LIBSTDCXX_LINK", "")), *link_args],
        py_limited_api=True,
    )


def is_gcc(compiler: object) -> bool:
    """True if the C++ compiler is g++, under whatever prefix and version."""
    command = getattr(compiler, "compiler_so_cxx", None) or [""]
    return re.fullmatch(r"(.*-)?g\+\+(-[\d.]+)?", Path(command[0]).name) is not None


@contextmanager
def precompiled_headers(
    compile_sources: Callable[..., list[str]], options: dict[str, object]
) -> Iterator[list[str]]:
    """Parse what most files include once; yields the options with which g++ uses that.

    The code that g++ makes is the same, but for the order of functions.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("headers.h", "headers.cpp"):
            (folder / file).write_text(f'#include "{COMMON_HEADER}"\n')
        (made,) = compile_sources(
            [str(folder / "headers.cpp")],
            output_dir=name,
            **options,
            extra_preargs=["-x", "c++-header"],
        )
        Path(made).rename(folder / "headers.h.gch")
        yield ["-include", str(folder / "headers.h")]


class ParallelBuild(build_ext):
    """Compiles the files of an extension side by side, and only those that have changed."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext` with a compiler that takes many files at once."""
        one_by_one = self.compiler.compile
        newest_header = max(Path(header).stat().st_mtime for header in ext.depends)

        def compile_all(sources: list[str], *, output_dir: str, **options: object) -> list[str]:
            targets = self.compiler.object_filenames(sources, output_dir=output_dir)
            stale = [
                source
                for source, target in zip(sources, targets, strict=True)
                if self.force
                or not Path(target).exists()
                or Path(target).stat().st_mtime < max(newest_header, Path(source).stat().st_mtime)
            ]
            with ExitStack() as stack:
                if len(stale) >= MANY_FILES and is_gcc(self.compiler):
                    headers = precompiled_headers(one_by_one, options)
                    options["extra_preargs"] = stack.enter_context(headers)
                pool = stack.enter_context(ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))))

                def compile_one(source: str) -> None:
                    one_by_one([source], output_dir=output_dir, **options)

                list(pool.map(compile_one, stale))
            return targets

        self._remove_other_builds(ext)
        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = one_by_one

    def _remove_other_builds(self, ext: Extension) -> None:
        """Remove builds in the tree under another name, which Python might import before this."""
        target = Path(self.get_ext_fullpath(ext.name))
        for other in target.parent.glob(f"{ext.name.rpartition('.')[2]}.*.so"):
            if other.name != target.name:
                other.unlink()


def shipped_benchmarks() -> list[Path]:
    """The files of benchmarks/ that are in a wheel, as llm_datadist_torch/shipped/benchmarks/."""
    folder = ROOT / "benchmarks"
    files = [folder / "forwarder.c", *(folder / f"{name}.py" for name in BENCHMARKS)]
    for name in BENCHMARK_FOLDERS:
        files += sorted((folder / name).glob("*.py")) + sorted((folder / name).glob("*.c"))
    return files


class BuildWithBenchmarks(build_py):
    """Copies the benchmarks into a wheel; an editable installation has them beside the package."""

    def run(self) -> None:
        """Copy the package, and the benchmarks."""
        super().run()
        if self.editable_mode:
            return
        for source in shipped_benchmarks():
            target = Path(self.build_lib, "llm_datadist_torch", "shipped", source.relative_to(ROOT))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


setup(
    ext_modules=[extension(), hixl_library()],
    cmdclass={"build_ext": ParallelBuild, "build_py": BuildWithBenchmarks},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
