# SPDX-License-Identifier: Apache-2.0
"""What names the weights of a model or an adapter: a digest of samples of its files.

Two engines must not take each other's KV if their weights differ, though paths and names are the
same; and may if they are the same under other names. Reading all of a large model takes minutes, so
the digest is over the size of each weight file, its header and bytes at fixed places: of each
tensor of a ``.safetensors`` file, or evenly spread over another one. It does not depend on how the
weights are shared by workers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

SAMPLE_BYTES = 64
MAX_SAMPLES = 1024
"""Of a file."""
_MAX_HEADER = 1 << 27
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Files that lie beside weights under the same suffixes, and are none.
_OTHERS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt")


def digest_of_files(where: Path) -> str | None:
    """Digest of the weight files in a directory, or of one file.

    Args:
        where: The directory, or the file.

    Returns:
        None if there are no weight files.
    """
    files = weight_files(where)
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=12)
    for path in files:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            for piece in _samples(file, path.suffix == ".safetensors"):
                digest.update(piece)
    return digest.hexdigest()


def locate(model: str, revision: str | None) -> Path | None:
    """Where the files of a model or an adapter are on this host.

    Args:
        model: A path, or the id of a repository that is in the local cache.
        revision: Of the repository.

    Returns:
        None if they are not here.
    """
    path = Path(model)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def weight_files(where: Path) -> list[Path]:
    """The weight files of a model, in order: of the first kind of which there are any."""
    if where.is_file():
        return [where]
    if not where.is_dir():
        return []
    for suffix in _SUFFIXES:
        found = [path for path in where.iterdir() if path.suffix == suffix]
        found = sorted(path for path in found if path.name not in _OTHERS)
        if found:
            return _without_copies(found)
    return []


def _without_copies(files: list[Path]) -> list[Path]:
    """Some models come as ``consolidated*.safetensors`` a second time."""
    others = [path for path in files if not path.name.startswith("consolidated")]
    return others or files


def _samples(file: BinaryIO, safetensors: bool) -> Iterator[bytes]:
    size = file.seek(0, 2)
    yield struct.pack("<Q", size)
    places: Iterable[int] = range(0, size, max(SAMPLE_BYTES, size // MAX_SAMPLES))
    if safetensors:
        header = _header(file, size)
        if header is not None:
            yield header
            places = _tensor_places(header)
    for place in places:
        file.seek(place)
        yield file.read(SAMPLE_BYTES)


def _header(file: BinaryIO, size: int) -> bytes | None:
    file.seek(0)
    start = file.read(8)
    if len(start) < 8:
        return None
    (length,) = struct.unpack("<Q", start)
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        return None
    return file.read(length)


def _tensor_places(header: bytes) -> list[int]:
    """The start and the middle of tensors: of each, or of evenly chosen ones of very many."""
    try:
        tensors = json.loads(header)
        spans = sorted(
            (int(each["data_offsets"][0]), int(each["data_offsets"][1]))
            for name, each in tensors.items()
            if name != "__metadata__"
        )
    except (ValueError, TypeError, KeyError, IndexError):
        return []
    first = 8 + len(header)
    places = [first + at for start, stop in spans for at in (start, (start + stop) // 2)]
    if len(places) > MAX_SAMPLES:
        # Scattered: layers repeat, so equal distances would leave out the same tensor of each.
        places = sorted(sorted(places, key=lambda at: at * 2654435761 % 2**32)[:MAX_SAMPLES])
    return places
