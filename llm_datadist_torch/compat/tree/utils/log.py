# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.utils.log``: a logger to standard output, set up when it is first used.

The library itself logs to ``logging.getLogger("llm_datadist_torch")`` and sets nothing up.
"""

from __future__ import annotations

import logging
import sys
import threading

from llm_datadist_torch.values.environment import environment_text

__all__ = ["error", "get_logger", "info", "warn"]

_LEVELS = {"0": logging.DEBUG, "1": logging.INFO, "2": logging.WARNING}
_FORMAT = "[%(levelname)s] %(name)s %(asctime)s %(pathname)s:%(lineno)d %(message)s"
_lock = threading.Lock()


def get_logger() -> logging.Logger:
    """The logger ``LLM_DATADIST``; its level is that of ``ASCEND_GLOBAL_LOG_LEVEL``."""
    logger = logging.getLogger("LLM_DATADIST")
    with _lock:
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stdout)
            handler.setFormatter(logging.Formatter(_FORMAT))
            logger.addHandler(handler)
            logger.setLevel(_LEVELS.get(environment_text("ASCEND_GLOBAL_LOG_LEVEL"), logging.ERROR))
            logger.propagate = False
    return logger


def info(message: str, *args: object) -> None:
    """Log at level INFO; ``args``, if any, go into ``message`` by ``%``."""
    get_logger().info(message, *args, stacklevel=2)


def warn(message: str, *args: object) -> None:
    """Log at level WARNING."""
    get_logger().warning(message, *args, stacklevel=2)


def error(message: str, *args: object) -> None:
    """Log at level ERROR."""
    get_logger().error(message, *args, stacklevel=2)


def _find_caller() -> tuple[str, int, str]:
    """File, line and function of the first frame outside this module."""
    frame = sys._getframe()  # noqa: SLF001 (what logging itself uses)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
