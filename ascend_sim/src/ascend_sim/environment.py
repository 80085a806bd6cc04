# SPDX-License-Identifier: Apache-2.0
"""The environment variables by which the simulator reaches child processes."""

from __future__ import annotations

import os
from collections.abc import Mapping


def environment_text(name: str) -> str:
    """Returns an environment variable, "" if it isn't set."""
    return os.environ.get(name, "")


def update_environment(values: Mapping[str, str | None]) -> None:
    """Sets variables for this process and its children; None removes one."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def prepend_to_path(name: str, directory: str) -> None:
    """Puts a directory first in a variable that is a list of directories, unless it is in there."""
    directories = [part for part in environment_text(name).split(os.pathsep) if part]
    if directory not in directories:
        os.environ[name] = os.pathsep.join([directory, *directories])
