# SPDX-License-Identifier: Apache-2.0
"""Link secrets: texts that no message, log or repr shows, and the file that one may be in."""

from __future__ import annotations

import os
import stat

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.environment import environment_text
from llm_datadist_torch.values.status import LLMException

SHORTEST_SECRET, LONGEST_SECRET = 16, 4096
"""Characters of a link secret."""

SECRET_FILE_VARIABLE = "LLM_DATADIST_LINK_SECRET_FILE"  # noqa: S105 (the name of a variable)
_MAX_BYTES = 4 * LONGEST_SECRET + 2


class SecretText(str):
    """A text that is not shown where the dict or object that holds it is printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'<secret>'"


def check_link_secret(name: str, text: str) -> SecretText:
    """Returns a link secret as a text that hides itself.

    Raises:
        LLMParamError: it is too short or too long; the message does not show it.
    """
    if not SHORTEST_SECRET <= len(text) <= LONGEST_SECRET:
        raise param_error(
            f"{name} has {len(text)} characters, {SHORTEST_SECRET} to {LONGEST_SECRET} are needed.",
            remedy=('make one by: python -c "import secrets; print(secrets.token_urlsafe(32))"'),
        )
    return SecretText(text)


def check_secret_value(name: str, value: str | None) -> str | None:
    """Returns what a config keeps of a link secret.

    Raises:
        TypeError: it is not a str.
        LLMParamError: as :func:`check_link_secret`.
    """
    # Not by check_isinstance, whose message shows the value.
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be str, but is {type(value).__name__}")
    return value if value is None else check_link_secret(name, value)


def secret_from_file() -> str | None:
    """Reads the secret from the file that `LLM_DATADIST_LINK_SECRET_FILE` names, None for no file.

    White space around it does not count.

    Raises:
        LLMParamError: the file can't be read, is not a regular file, or is open to all users; it
            is not UTF-8 text; or what is in it is too short or too long.
    """
    path = environment_text(SECRET_FILE_VARIABLE)
    if not path:
        return None
    try:
        # Not blocking, because opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _file_error(path, f"can't be read: {error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _file_error(path, "is no regular file")
        if status.st_mode & stat.S_IRWXO:
            mode = stat.S_IMODE(status.st_mode)
            raise _file_error(path, f"is open to all users of this host (mode {mode:04o})")
        data = os.read(descriptor, _MAX_BYTES)
    finally:
        os.close(descriptor)
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise _file_error(path, "is no UTF-8 text") from None
    return check_link_secret(f"the secret in {path}", text)


def _file_error(path: str, fault: str) -> LLMException:
    return param_error(
        f"{SECRET_FILE_VARIABLE}={path!r} {fault}.",
        remedy="name a file that only the user of the service can read: chmod 600.",
    )
