# SPDX-License-Identifier: Apache-2.0
"""The three kinds of keys: arguments, checks, repr, and what each names."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from llm_datadist_torch.values.keys import (
    INVALID_ID,
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    check_cache_key,
    is_invalid_id,
    is_valid_id,
)
from llm_datadist_torch.values.status import LLMException, LLMParamError, LLMStatusCode

PI = LLMParamError
TOO_LARGE = 2**64


def test_ids():
    assert INVALID_ID == 18446744073709551615
    assert is_valid_id(0)
    assert not is_valid_id(INVALID_ID)
    assert is_invalid_id(INVALID_ID)
    assert not is_invalid_id(0)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 2), {}, (1, 2, 0, INVALID_ID)),
        ((1, 2, 3, 4), {}, (1, 2, 3, 4)),
        ((), {"cluster_id": 1, "req_id": 2}, (1, 2, 0, INVALID_ID)),
        ((), {"prompt_cluster_id": 1, "req_id": 2, "prefix_id": 5}, (1, 2, 0, 5)),
        ((1,), {"req_id": 2, "model_id": 7}, (1, 2, 7, INVALID_ID)),
        ((1, 2), {"cluster_id": 7}, (1, 2, 0, INVALID_ID)),
        ((1, 2), {"prompt_cluster_id": 7}, (1, 2, 0, INVALID_ID)),
        (
            (),
            {"prompt_cluster_id": 8, "cluster_id": 1, "req_id": 2},
            (1, 2, 0, INVALID_ID),
        ),
        ((True, 2), {}, (1, 2, 0, INVALID_ID)),
        ((INVALID_ID, INVALID_ID), {}, (INVALID_ID, INVALID_ID, 0, INVALID_ID)),
    ],
)
def test_cache_key_arguments(args, kwargs, expected):
    key = CacheKey(*args, **kwargs)
    assert (key.cluster_id, key.req_id, key.model_id, key.prefix_id) == expected
    assert key.prompt_cluster_id == key.cluster_id


@pytest.mark.parametrize(
    ("args", "kwargs", "expected", "text"),
    [
        ((1, 2, 3, 4, 5), {}, PI, "at most 4"),
        ((1, 2, 3), {"model_id": 1, "prefix_id": 2}, PI, "at most 4"),
        ((), {}, PI, "cluster_id is required"),
        ((), {"req_id": 1}, PI, "cluster_id is required"),
        ((1,), {}, PI, "req_id is required"),
        ((), {"prompt_cluster_id": 1}, PI, "req_id is required"),
        ((1, 2), {"request": 1}, PI, "Unsupported"),
        ((1,), {"request": 1}, PI, "req_id is required"),
        ((None, 2), {}, TypeError, "cluster_id only support"),
        ((1, None), {}, TypeError, "req_id"),
        ((1, 2, "3"), {}, TypeError, "model_id"),
        ((1, 2), {"prefix_id": 1.0}, TypeError, "prefix_id"),
        ((np.float64(1), 2), {}, TypeError, "cluster_id"),
        ((-1, 2), {}, ValueError, "cluster_id=-1"),
        ((1, TOO_LARGE), {}, ValueError, "req_id="),
        ((1, 2, -1), {}, ValueError, "model_id=-1"),
        ((1, 2, 3, TOO_LARGE), {}, ValueError, "prefix_id="),
    ],
)
def test_bad_cache_keys(args, kwargs, expected, text):
    with pytest.raises(expected, match=text) as caught:
        CacheKey(*args, **kwargs)
    assert isinstance(caught.value, LLMException) == (expected is PI)
    if expected is PI:
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (
            CacheKey(1, 2),
            "CacheKey(cluster_id=1, req_id=2, prefix_id=18446744073709551615, model_id=0)",
        ),
        (
            CacheKey(prompt_cluster_id=1, req_id=2, prefix_id=3, model_id=4),
            "CacheKey(cluster_id=1, req_id=2, prefix_id=3, model_id=4)",
        ),
        (BlocksCacheKey(1), "BlocksCacheKey(cluster_id=1, model_id=0)"),
        (BlocksCacheKey(cluster_id=1), "BlocksCacheKey(cluster_id=1, model_id=0)"),
        (
            BlocksCacheKey(prompt_cluster_id=1, model_id=2),
            "BlocksCacheKey(prompt_cluster_id=1, model_id=2)",
        ),
        (
            BlocksCacheKey(cluster_id=1, prompt_cluster_id=2),
            "BlocksCacheKey(cluster_id=1, model_id=0)",
        ),
        (
            CacheKeyByIdAndIndex(1, 2),
            "CacheKeyByIdAndIndex(cluster_id=1, cache_id=2, batch_index=0)",
        ),
    ],
)
def test_repr_pickle_and_copy(key, text):
    assert repr(key) == str(key) == text
    assert repr(pickle.loads(pickle.dumps(key))) == repr(copy.copy(key)) == text


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1,), {}, (1, 0)),
        ((1, 2), {}, (1, 2)),
        ((1,), {"model_id": 3}, (1, 3)),
        ((1,), {"cluster_id": 3}, (1, 0)),
        ((), {"prompt_cluster_id": 1, "model_id": 2}, (1, 2)),
        ((), {"cluster_id": 1, "prompt_cluster_id": 2}, (1, 0)),
    ],
)
def test_blocks_cache_key_arguments(args, kwargs, expected):
    key = BlocksCacheKey(*args, **kwargs)
    assert (key.cluster_id, key.model_id) == expected
    assert key.prompt_cluster_id == key.cluster_id


@pytest.mark.parametrize(
    ("args", "kwargs", "expected", "text"),
    [
        ((1, 2, 3), {}, PI, "at most 2"),
        ((1, 2), {"model_id": 3}, PI, "at most 2"),
        ((), {}, PI, "cluster_id is required"),
        ((), {"model_id": 1}, PI, "cluster_id is required"),
        ((1,), {"req_id": 1}, PI, "Unsupported"),
        (("1",), {}, TypeError, "cluster_id only support"),
        ((None,), {}, TypeError, "cluster_id only support"),
        ((1, 2.0), {}, TypeError, "model_id only support"),
        ((-1,), {}, ValueError, "cluster_id=-1"),
        ((1, TOO_LARGE), {}, ValueError, "model_id="),
    ],
)
def test_bad_blocks_cache_keys(args, kwargs, expected, text):
    with pytest.raises(expected, match=text) as caught:
        BlocksCacheKey(*args, **kwargs)
    assert isinstance(caught.value, LLMException) == (expected is PI)


def test_key_by_id_and_index():
    key = CacheKeyByIdAndIndex(1, -5, 2**32 - 1)
    assert (key.cluster_id, key.cache_id, key.batch_index) == (1, -5, 2**32 - 1)
    assert not hasattr(key, "prompt_cluster_id")


@pytest.mark.parametrize(
    ("args", "expected", "text"),
    [
        ((None, 1), TypeError, "cluster_id"),
        ((-1, 1), ValueError, "cluster_id"),
        ((1, "1"), TypeError, "cache_id"),
        ((1, 2**63), ValueError, "cache_id"),
        ((1, 1, None), TypeError, "batch_index"),
        ((1, 1, -1), ValueError, "batch_index"),
        ((1, 1, 2**32), ValueError, "batch_index"),
        (("a", "b", "c"), TypeError, "cluster_id"),
    ],
)
def test_bad_keys_by_id_and_index(args, expected, text):
    with pytest.raises(expected, match=text):
        CacheKeyByIdAndIndex(*args)


@pytest.mark.parametrize("key", [CacheKey(1, 2), BlocksCacheKey(1), CacheKeyByIdAndIndex(1, 2)])
def test_keys_are_read_only_and_compared_by_identity(key):
    properties = [name for name in dir(key) if not name.startswith("_")]
    assert properties
    for name in properties:
        with pytest.raises(AttributeError):
            setattr(key, name, 1)
    assert key != copy.copy(key)
    assert len({key, copy.copy(key)}) == 2


@pytest.mark.parametrize(
    ("req_id", "prefix_id", "prefix", "placeholder", "usable"),
    [
        (5, INVALID_ID, False, False, True),
        (INVALID_ID, 5, True, False, True),
        (5, 6, True, False, False),
        (INVALID_ID, INVALID_ID, False, True, False),
    ],
)
def test_kinds_of_cache_keys(req_id, prefix_id, prefix, placeholder, usable):
    key = CacheKey(1, req_id, prefix_id=prefix_id)
    assert (key.is_prefix, key.is_placeholder) == (prefix, placeholder)
    if usable:
        assert check_cache_key(key) is key
    else:
        with pytest.raises(LLMParamError, match="my_key: exactly one of req_id and prefix_id"):
            check_cache_key(key, "my_key")
