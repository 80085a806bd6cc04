# SPDX-License-Identifier: Apache-2.0
"""Link secrets: texts that no message, log or repr shows."""

from __future__ import annotations

from llm_datadist_torch.values.checks import param_error

SHORTEST_SECRET, LONGEST_SECRET = 16, 4096
"""Characters of a link secret."""


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
        TypeError: it is no str.
        LLMParamError: as :func:`check_link_secret`.
    """
    # Not by check_isinstance, whose message shows the value.
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be str, but is {type(value).__name__}")
    return value if value is None else check_link_secret(name, value)
