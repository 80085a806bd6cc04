# SPDX-License-Identifier: Apache-2.0
"""Says what wheels need of a machine, and fails if it is more than their tags promise.

auditwheel tells of glibc and libstdc++, abi3audit of CPython's limited API, for the architecture of
the wheel, whatever this machine's.

    python scripts/check_wheels.py dist/*.whl
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path


def output_of(module: str, *arguments: str) -> str:
    """What a tool prints.

    Raises:
        SystemExit: The tool found something.
    """
    done = subprocess.run(
        [str(Path(sys.executable).with_name(module)), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def check(wheel: Path) -> None:
    """Check one wheel."""
    promised = wheel.stem.rsplit("-", 1)[1]
    audit = output_of("auditwheel", "show", str(wheel))
    consistent = " ".join(audit.split()).partition("consistent with the following platform tag: ")[
        2
    ]
    found = consistent.partition('"')[2].partition('"')[0]
    if tag_version(found) > tag_version(promised):
        raise SystemExit(f"{wheel.name} needs {found}:\n{audit}")
    output_of("abi3audit", "--strict", str(wheel))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {found}, abi3, sha256 {digest}")


def tag_version(tag: str) -> tuple[int, int]:
    """The glibc of a tag such as manylinux_2_28_x86_64."""
    kind, major, minor = tag.split("_")[:3]
    if kind != "manylinux":
        raise SystemExit(f"auditwheel says {tag!r}, which is no tag of manylinux")
    return int(major), int(minor)


def main() -> None:
    """Check the wheels that are named."""
    wheels = [Path(name) for name in sys.argv[1:]]
    if not wheels:
        raise SystemExit("no wheel given")
    for wheel in wheels:
        check(wheel)


if __name__ == "__main__":
    main()
