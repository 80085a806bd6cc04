# SPDX-License-Identifier: Apache-2.0
"""Keys of the front door are values; those of the reference API keep their identity."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import llm_datadist_torch as ld
from llm_datadist_torch import BlocksKey, CacheKey, LLMParamError, PrefixKey, RequestKey, RowKey

KEYS = [
    BlocksKey(),
    BlocksKey("kv"),
    BlocksKey(7),
    RequestKey(1),
    RequestKey(1, "kv"),
    PrefixKey(1),
    RowKey(1),
    RowKey(1, 2),
]


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_a_key_is_a_value(key):
    assert [other for other in KEYS if other == key] == [key]
    for same in (copy.deepcopy(key), pickle.loads(pickle.dumps(key)), eval(repr(key), vars(ld))):
        assert same == key
        assert hash(same) == hash(key)
        assert {key: 1}[same] == 1
    with pytest.raises(AttributeError):
        key.name = "other"


def test_a_name_is_the_same_number_everywhere():
    # Of BLAKE2b of "kv", 8 bytes, little-endian, with the highest bit set: part of the protocol.
    assert BlocksKey("kv").at(3).model_id == BlocksKey("kv").at(4).model_id
    assert BlocksKey("kv").at(3).model_id >> 63 == 1
    assert BlocksKey("kv").at(3).model_id != BlocksKey("KV").at(3).model_id
    assert BlocksKey(7).at(3).model_id == 7
    assert BlocksKey("kv").at(3).cluster_id == 3


def test_at_gives_the_keys_of_the_reference_api():
    request, prefix = RequestKey(5, 6).at(4), PrefixKey(5, 6).at(4)
    assert (request.cluster_id, request.req_id, request.model_id) == (4, 5, 6)
    assert not request.is_prefix
    assert (prefix.prefix_id, prefix.model_id, prefix.is_prefix) == (5, 6, True)
    row = RowKey(5, 6).at(4)
    assert (row.cluster_id, row.cache_id, row.batch_index) == (4, 5, 6)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: BlocksKey(None), TypeError),
        (lambda: BlocksKey(""), LLMParamError),
        (lambda: BlocksKey(-1), ValueError),
        (lambda: RequestKey("1"), TypeError),
        (lambda: RequestKey(2**64), ValueError),
        (lambda: RequestKey(2**64 - 1), LLMParamError),
        (lambda: PrefixKey(2**64 - 1), LLMParamError),
        (lambda: RowKey(0), LLMParamError),
        (lambda: RowKey(1, -1), ValueError),
    ],
)
def test_wrong_keys(make, error):
    with pytest.raises(error):
        make()


def test_keys_of_the_reference_api_keep_their_identity():
    assert CacheKey(1, 2) != CacheKey(1, 2)
    assert repr(CacheKey(1, 2)).startswith("CacheKey(cluster_id=1, req_id=2, prefix_id=")


@pytest.mark.parametrize(
    ("key_class", "names"),
    [
        (ld.CacheKey, ["cluster_id", "req_id", "model_id", "prefix_id"]),
        (ld.BlocksCacheKey, ["cluster_id", "model_id"]),
    ],
)
def test_signatures_show_the_parameters(key_class, names):
    assert list(inspect.signature(key_class).parameters) == names
