# SPDX-License-Identifier: Apache-2.0
"""The counters by which peers notice that a cache has changed."""

from __future__ import annotations

import os

import pytest

from llm_datadist_torch import _C
from llm_datadist_torch.caches.versions import SLOTS, WORD_BYTES, Generations
from tests.memory.peer import map_pages, unmap


def test_what_changes_when() -> None:
    generation = Generations().take()
    binding, memory = generation.binding, generation.memory
    generation.rebound()
    assert (generation.binding, generation.memory) == (binding + 1, memory)
    generation.freed()
    assert (generation.binding, generation.memory) == (binding + 2, memory + 1)


def test_they_go_on_counting_for_the_next_cache() -> None:
    generations = Generations()
    first = generations.take()
    first.freed()
    before = first.binding, first.memory
    generations.give_back(first)
    second = generations.take()
    assert (second.region, second.offset) == (first.region, first.offset)
    assert (second.binding, second.memory) == before


def test_every_cache_has_its_own() -> None:
    generations = Generations()
    taken = [generations.take() for _ in range(SLOTS + 1)]
    places = {(generation.region.region_id, generation.offset) for generation in taken}
    assert len(places) == SLOTS + 1
    assert len({generation.region.region_id for generation in taken}) == 2
    taken[0].freed()
    assert all(generation.binding == 0 for generation in taken[1:])
    last = max(generation.offset for generation in taken)
    assert last + 2 * WORD_BYTES == taken[0].region.nbytes


def test_a_forked_child_changes_nothing() -> None:
    generation = Generations().take()
    child = os.fork()
    if child == 0:
        generation.freed()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (generation.binding, generation.memory) == (0, 0)


@pytest.mark.parametrize("call", [_C.load_word, _C.bump_word])
def test_words_are_aligned(call) -> None:
    address = map_pages(4096)
    try:
        for bad in (0, address + 4):
            with pytest.raises(ValueError, match="64-bit word"):
                call(bad)
        assert [_C.bump_word(address), _C.bump_word(address)] == [1, 2]
        assert [_C.load_word(address), _C.load_word(address + 8)] == [2, 0]
    finally:
        unmap(address, 4096)
