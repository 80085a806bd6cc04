# SPDX-License-Identifier: Apache-2.0
"""A progress bar for work that takes long: the demo, ``bench``, the soak. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bar(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """Show on standard error how far work is.

    Nothing is written where standard error is no terminal, or without the package ``rich``. The bar
    is drawn only by calls, never by a thread, so that it takes no time from what is measured.

    Args:
        what: The work.
        total: All of it, in any unit.

    Yields:
        A function to be called with how much is done.
    """
    progress = _progress()
    if progress is None:
        yield lambda _done: None
        return
    with progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done, refresh=True)


def _progress() -> Progress | None:
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    # What is printed appears above the bar, unless it goes to a file.
    return Progress(
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
