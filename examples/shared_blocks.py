# SPDX-License-Identifier: Apache-2.0
"""Blocks that several sequences share: counted, and found again by the tokens that they hold."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from paged_model import BLOCK_SIZE, BlockAllocator, OutOfBlocksError, PagedCache


class BlockPool(BlockAllocator):
    """The device blocks: counted references, and full blocks that can be found by their hash.

    A block that nobody refers to keeps its hash until it is taken again, the longest unused first.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(())
        self._unused = dict.fromkeys(range(num_blocks))  # an ordered set
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.references: Counter[int] = Counter()

    @property
    def num_free(self) -> int:
        return len(self._unused)

    def take(self, count: int) -> list[int]:
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks asked for, {self.num_free} free")
        blocks = list(self._unused)[:count]
        for block in blocks:
            self._by_hash.pop(self._hash_of.pop(block, b""), None)
        self.share(blocks)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block; one that was unused is in use again, as it was."""
        for block in blocks:
            self._unused.pop(block, None)
            self.references[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                self._unused[block] = None

    def publish(self, digest: bytes, block: int) -> None:
        """Lets others find a full block, unless they can find an equal one already."""
        if digest not in self._by_hash and block not in self._hash_of:
            self._by_hash[digest], self._hash_of[block] = block, digest

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Returns the blocks of the longest known prefix."""
        found: list[int] = []
        for digest in digests:
            if digest not in self._by_hash:
                break
            found.append(self._by_hash[digest])
        return found


def block_hashes(tokens: Sequence[int]) -> list[bytes]:
    """Returns one hash per full block, of all the tokens up to its end."""
    hashes, digest = [], hashlib.sha256()
    for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        digest.update(repr(tokens[start : start + BLOCK_SIZE]).encode())
        hashes.append(digest.digest())
    return hashes


def place(kv: PagedCache, blocks: list[int], length: int) -> None:
    """Says where a sequence is: the first `length` tokens are in these blocks."""
    kv.table.set(blocks)
    for layer in kv.layers:
        layer.length = length
