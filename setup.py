# SPDX-License-Identifier: Apache-2.0
"""Builds the one C++ extension; everything static is in pyproject.toml.

Flags, each "1" or absent, all off by default and echoed when on:

* ``DEBUG=1``     no optimisation, debug symbols
* ``SANITIZE=1``  AddressSanitizer and UndefinedBehaviorSanitizer (see scripts/test_sanitize.sh)
* ``COVERAGE=1``  gcov instrumentation
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent


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
    # No -std here: torch's build helper adds the one that its own headers need (C++17 or later).
    compile_args = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
    link_args: list[str] = []
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


def extension() -> CppExtension:
    """The extension `llm_datadist_torch._C`: every file of csrc/."""
    compile_args, link_args = compiler_flags()
    return CppExtension(
        name="llm_datadist_torch._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
