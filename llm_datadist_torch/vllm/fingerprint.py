# SPDX-License-Identifier: Apache-2.0
"""What two engines must have in common, so that one's KV means the same to the other."""

from __future__ import annotations

import hashlib

import msgspec


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that must be equal at both ends.

    Attributes:
        vllm: Version of vLLM.
        model: Name of the model: the last part of its path, and its revision.
        config: Digest of the model's configuration.
        dtype: Element type of the model.
        kv_dtype: Element type of the KV cache.
        kernel: Attention backend, and the kernel that it arranges the KV for.
    """

    vllm: str
    model: str
    config: str
    dtype: str
    kv_dtype: str
    kernel: str

    def differences(self, other: Fingerprint) -> list[str]:
        """What is not equal, in words; empty if all is."""
        return [
            f"{name} is {mine!r} here and {theirs!r} there"
            for name in self.__struct_fields__
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]


def digest_of(*parts: msgspec.Struct | str) -> str:
    """A short digest of facts; equal ones have equal digests."""
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=12).hexdigest()
