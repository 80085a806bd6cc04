# SPDX-License-Identifier: Apache-2.0
"""Environment variables. Tools read and set them: `cli` and `compat`.

The library itself reads where the members of a communicator meet (`link`), which file has the link
secret (`init`), whether the Ascend runtime is simulated, and the options of `open`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def environment_text(name: str) -> str:
    """Returns an environment variable, "" if it isn't set."""
    return os.environ.get(name, "")


def environment_texts(prefix: str) -> dict[str, str]:
    """Returns the environment variables whose names begin so."""
    return {name: text for name, text in os.environ.items() if name.startswith(prefix)}


def set_environment(values: Mapping[str, str | None]) -> None:
    """Sets variables for this process and its children; None removes one."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def defaults(values: Mapping[str, str]) -> Iterator[None]:
    """Sets those variables that aren't set, and takes them back afterwards."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def add_to_pythonpath(directory: str) -> None:
    """Puts a directory first on the PYTHONPATH that child processes get, unless it is there."""
    before = environment_text("PYTHONPATH")
    if directory not in before.split(os.pathsep):
        os.environ["PYTHONPATH"] = f"{directory}{os.pathsep}{before}" if before else directory


def npu_is_simulated() -> bool:
    """Whether the distribution ascend-sim has put its runtime under torch_npu in this process.

    It sets this variable, also for child processes.
    """
    return bool(environment_text("ASCEND_SIM_LIBRARIES"))
