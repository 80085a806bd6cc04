# SPDX-License-Identifier: Apache-2.0
"""What two engines must have in common, so that one's KV means the same to the other."""

from __future__ import annotations

import hashlib

import msgspec


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that must be equal at both ends.

    Attributes:
        vllm: Version of vLLM.
        platform: The platform's plugin with its version, and the chip.
        weights: What names the weights: a digest of the weight files, or the user's ``weights_id``.
        config: Digest of the model's configuration.
        dtype: Element type of the model.
        kv_dtype: Element type of the KV cache: the type itself, not what the user called it.
        kernel: Attention backend, and the kernel that it arranges the KV for.
    """

    vllm: str
    platform: str
    weights: str
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


_KV_DTYPES = {
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "half": "float16",
    "float": "float32",
}


def kv_dtype(text: str, model_dtype: str) -> str:
    """The element type that a ``kv_cache_dtype`` means.

    Args:
        text: vLLM's setting; "auto" is the model's type.
        model_dtype: The model's type, as "torch.float16" or "float16".
    """
    name = model_dtype if text == "auto" else text
    name = name.removeprefix("torch.")
    return _KV_DTYPES.get(name, name)


def digest_of(*parts: msgspec.Struct | str) -> str:
    """A short digest of facts; equal ones have equal digests."""
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=12).hexdigest()
