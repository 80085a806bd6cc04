# SPDX-License-Identifier: Apache-2.0
"""LLMStatusCode, the exception tree and the reference's little helpers around them."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from llm_datadist_torch.values import status as status_module
from llm_datadist_torch.values.status import (
    LLMCacheNotFoundError,
    LLMDeviceError,
    LLMException,
    LLMFeatureNotEnabledError,
    LLMLinkError,
    LLMNotLinkedError,
    LLMOutOfMemoryError,
    LLMParamError,
    LLMPeerLostError,
    LLMStatusCode,
    LLMTimeoutError,
    Status,
    code_2_status,
    error_for,
    handle_llm_status,
    raise_if_false,
    raise_if_true,
    status_meaning,
)

# The reference API's table 2.1, written out once more.
CODES = {
    "LLM_SUCCESS": 0,
    "LLM_FAILED": 4294967295,
    "LLM_WAIT_PROCESS_TIMEOUT": 1343270913,
    "LLM_KV_CACHE_NOT_EXIST": 1343270914,
    "LLM_REPEAT_REQUEST": 1343270915,
    "LLM_REQUEST_ALREADY_COMPLETED": 1343270916,
    "LLM_PARAM_INVALID": 1343270917,
    "LLM_ENGINE_FINALIZED": 1343270918,
    "LLM_NOT_YET_LINK": 1343270919,
    "LLM_ALREADY_LINK": 1343270920,
    "LLM_LINK_FAILED": 1343270921,
    "LLM_UNLINK_FAILED": 1343270922,
    "LLM_NOTIFY_PROMPT_UNLINK_FAILED": 1343270923,
    "LLM_CLUSTER_NUM_EXCEED_LIMIT": 1343270924,
    "LLM_PROCESSING_LINK": 1343270925,
    "LLM_DEVICE_OUT_OF_MEMORY": 1343270926,
    "LLM_PREFIX_ALREADY_EXIST": 1343270927,
    "LLM_PREFIX_NOT_EXIST": 1343270928,
    "LLM_SEQ_LENOVERLIMIT": 1343270929,
    "LLM_NO_FREE_BLOCK": 1343270930,
    "LLM_BLOCKS_OUT_OF_MEMORY": 1343270931,
    "LLM_EXIST_LINK": 1343270936,
    "LLM_FEATURE_NOT_ENABLED": 1343270937,
    "LLM_TIMEOUT": 1343270938,
    "LLM_LINK_BUSY": 1343270939,
    "LLM_OUT_OF_MEMORY": 1343270940,
    "LLM_DEVICE_MEM_ERROR": 507053,
    "LLM_SUSPECT_REMOTE_ERROR": 507057,
    "LLM_UNKNOWN_ERROR": -1,
}

CLASSES = {
    "LLM_PARAM_INVALID": (LLMParamError, ValueError),
    "LLM_KV_CACHE_NOT_EXIST": (LLMCacheNotFoundError, LookupError),
    "LLM_NOT_YET_LINK": (LLMNotLinkedError, ConnectionError),
    "LLM_SUSPECT_REMOTE_ERROR": (LLMPeerLostError, LLMNotLinkedError),
    "LLM_LINK_FAILED": (LLMLinkError, ConnectionError),
    "LLM_UNLINK_FAILED": (LLMLinkError, ConnectionError),
    "LLM_ALREADY_LINK": (LLMLinkError, ConnectionError),
    "LLM_EXIST_LINK": (LLMLinkError, ConnectionError),
    "LLM_TIMEOUT": (LLMTimeoutError, TimeoutError),
    "LLM_OUT_OF_MEMORY": (LLMOutOfMemoryError, MemoryError),
    "LLM_FEATURE_NOT_ENABLED": (LLMFeatureNotEnabledError, RuntimeError),
    "LLM_DEVICE_MEM_ERROR": (LLMDeviceError, RuntimeError),
    "LLM_FAILED": (LLMException, RuntimeError),
}

SUBCLASSES = [
    value
    for value in vars(status_module).values()
    if isinstance(value, type) and issubclass(value, LLMException)
]


def test_codes_are_the_reference_table():
    assert {member.name: int(member) for member in LLMStatusCode} == CODES


@pytest.mark.parametrize("member", list(LLMStatusCode))
def test_text_of_a_code(member):
    name = f"LLMStatusCode.{member.name}"
    assert str(member) == f"{member}" == "{}".format(member) == name  # noqa: UP032
    assert f"{member:>50}" == name.rjust(50)
    assert f"{member:d}" == str(int(member)) == json.dumps(member)
    assert repr(member) == f"<{name}: {int(member)}>"
    assert member.meaning
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member


@pytest.mark.parametrize("code", [5, 0x5010B014, 0x5010B017, -2, 2**70, None, "0", 0.0])
def test_unmapped_codes_are_failures(code):
    assert code_2_status(code) is LLMStatusCode.LLM_FAILED
    assert status_meaning(code) == LLMStatusCode.LLM_FAILED.meaning


def test_mapped_codes():
    for name, code in CODES.items():
        assert code_2_status(code) is LLMStatusCode[name]
        assert status_meaning(code) == LLMStatusCode[name].meaning


def test_status():
    assert Status(LLMStatusCode.LLM_SUCCESS).is_ok()
    failed = Status(LLMStatusCode.LLM_TIMEOUT)
    assert not failed.is_ok()
    assert failed.status_code is LLMStatusCode.LLM_TIMEOUT


def test_plain_exception_is_as_in_the_reference():
    error = LLMException("x")
    assert error.status_code is LLMStatusCode.LLM_SUCCESS
    assert isinstance(error, RuntimeError)
    assert str(error) == "x"
    assert error.args == ("x",)
    assert (error.op, error.peer, error.cache_id, error.remedy) == (None,) * 4
    with pytest.raises(AttributeError):
        error.status_code = LLMStatusCode.LLM_FAILED
    given = LLMException("x", status_code=LLMStatusCode.LLM_TIMEOUT)
    assert given.status_code is LLMStatusCode.LLM_TIMEOUT


@pytest.mark.parametrize(("name", "classes"), CLASSES.items())
def test_error_for_builds_the_class_of_the_status(name, classes):
    error = error_for(LLMStatusCode[name], "m", op="pull_blocks", peer=3, cache_id=4, remedy="r")
    assert type(error) is classes[0]
    assert all(isinstance(error, base) for base in (*classes, LLMException, RuntimeError))
    assert error.status_code is LLMStatusCode[name]
    assert (error.op, error.peer, error.cache_id, error.remedy) == ("pull_blocks", 3, 4, "r")
    assert str(error) == "m Remedy: r"


@pytest.mark.parametrize(("name", "classes"), CLASSES.items())
def test_the_status_of_a_class_made_directly(name, classes):
    if classes[0] is LLMLinkError:
        name = "LLM_LINK_FAILED"
    if classes[0] is LLMPeerLostError:
        name = "LLM_NOT_YET_LINK"
    if classes[0] is not LLMException:
        assert classes[0]("m").status_code is LLMStatusCode[name]


@pytest.mark.parametrize("member", list(LLMStatusCode))
def test_error_for_takes_the_remedy_of_the_table(member):
    assert error_for(member, "m").remedy == (member.remedy or None)
    assert str(error_for(member, "m", remedy="")) == "m"


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_a_typed_error_never_says_success(cls):
    expected = cls is LLMException
    assert (cls("x").status_code is LLMStatusCode.LLM_SUCCESS) is expected
    assert (cls("x", status_code=LLMStatusCode.LLM_SUCCESS).status_code == 0) is expected
    busy = cls("x", status_code=LLMStatusCode.LLM_LINK_BUSY)
    assert busy.status_code is LLMStatusCode.LLM_LINK_BUSY


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
@pytest.mark.parametrize("args", [(), ("one",), (2, "two"), (1, "two", "three")])
@pytest.mark.parametrize("cls", SUBCLASSES)
def test_exceptions_survive_pickle_and_copy(cls, args, clone):
    error = cls(
        *args,
        status_code=LLMStatusCode.LLM_LINK_BUSY,
        op="op",
        peer=1,
        cache_id=2,
        remedy="{wait}",
    )
    if cls is LLMOutOfMemoryError:
        error.requested_bytes = 7
    twin = clone(error)
    assert type(twin) is cls
    assert twin is not error
    assert (twin.args, str(twin)) == (args, str(error))
    assert vars(twin) == vars(error)
    assert twin.status_code is LLMStatusCode.LLM_LINK_BUSY


def test_out_of_memory_carries_its_figures():
    error = LLMOutOfMemoryError("m", requested_bytes=3, free_bytes=2, largest_free_bytes=1)
    assert (error.requested_bytes, error.free_bytes, error.largest_free_bytes) == (3, 2, 1)
    bare = error_for(LLMStatusCode.LLM_OUT_OF_MEMORY, "m")
    assert (bare.requested_bytes, bare.free_bytes, bare.largest_free_bytes) == (None,) * 3


def test_handle_llm_status():
    assert handle_llm_status(0, "f", "i") is None
    with pytest.raises(LLMTimeoutError) as caught:
        handle_llm_status(CODES["LLM_TIMEOUT"], "[pull]", "id {1}")
    assert caught.value.args == ("[pull] failed, error code is LLMStatusCode.LLM_TIMEOUT, id {1}",)
    with pytest.raises(LLMException) as caught:
        handle_llm_status(12345, "f", "i")
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED


def test_raise_if():
    raise_if_false(True, "{} {}", 1)
    raise_if_true(False, "{} {}", 1)
    for raise_if, predicate in ((raise_if_false, 0), (raise_if_true, [1])):
        with pytest.raises(LLMParamError, match=r"^1 of 2$"):
            raise_if(predicate, "{} of {x}", 1, x=2)
        with pytest.raises(LLMNotLinkedError):
            raise_if(predicate, "m", status_code=LLMStatusCode.LLM_NOT_YET_LINK)


@pytest.mark.parametrize("text", ["{", "}", "{0}", "{name}", "{!}"])
def test_braces_in_text_do_no_harm(text):
    with pytest.raises(LLMParamError) as caught:
        raise_if_false(False, text)
    assert str(caught.value) == text
    with pytest.raises(LLMParamError) as caught:
        raise_if_true(True, "got {}", text)
    assert str(caught.value) == f"got {text}"
