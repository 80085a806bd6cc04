# SPDX-License-Identifier: Apache-2.0
"""What proves that members of a communicator share a secret."""

from __future__ import annotations

import hashlib
import hmac

from llm_datadist_torch.values.status import LLMStatusCode, error_for

SHARE_IT = "give all instances the same LLMConfig.link_secret, or none of them."


class MessageAuthenticator:
    """Marks what members of a communicator tell each other, so that nobody else can say it.

    Without a key it only says that there is none, so that members who differ notice.

    Args:
        key: ``LinkKeys.seal``, or None.
    """

    _OPEN, _SEALED = b"0", b"1"

    def __init__(self, key: bytes | None) -> None:
        self._key = key

    def close(self, context: tuple[str, ...], value: bytes) -> bytes:
        """``value`` with its mark, good for this context only."""
        if self._key is None:
            return self._OPEN + value
        return self._SEALED + self._mark(self._key, context, value) + value

    def open(self, context: tuple[str, ...], closed: bytes) -> bytes:
        """The value of what was closed in this context.

        Raises:
            LLMLinkError: It was not, or not with this key.
        """
        kind, rest = closed[:1], closed[1:]
        if self._key is None and kind == self._OPEN:
            return rest
        if self._key is not None and kind == self._SEALED:
            size = hashlib.sha256().digest_size
            mark, value = rest[:size], rest[size:]
            if hmac.compare_digest(mark, self._mark(self._key, context, value)):
                return value
            fault = "a member has another link_secret, or a stranger writes into the meeting"
        elif self._key is None:
            fault = "another member has a link_secret, and this instance has none"
        else:
            fault = "this instance has a link_secret, and another member has none"
        raise error_for(LLMStatusCode.LLM_LINK_FAILED, fault, op="link", remedy=SHARE_IT)

    @staticmethod
    def _mark(key: bytes, context: tuple[str, ...], value: bytes) -> bytes:
        # Lengths before the parts: no two lists of parts may look the same.
        parts = [part.encode("utf-8", "surrogatepass") for part in context]
        text = b"".join(len(part).to_bytes(8, "big") + part for part in [*parts, value])
        return hmac.digest(key, text, "sha256")
