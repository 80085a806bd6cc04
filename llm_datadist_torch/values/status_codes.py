# SPDX-License-Identifier: Apache-2.0
"""The one table of status codes: name, code, meaning, remedy, typical causes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist_torch.values.enums import NamedIntEnum

if TYPE_CHECKING:
    from typing_extensions import Self

_ENGINE = 0x5010B000


class LLMStatusCode(NamedIntEnum):
    """The table of status codes (reference API, 2.1): each row is code, meaning, remedy, causes.

    An empty remedy means that only the place that raises can say what to do. A failure without
    causes is a code of the reference that no call of this library returns. docs/errors.md is made
    from this table by ``scripts/make_errors_page.py``.
    """

    meaning: str
    remedy: str
    causes: tuple[str, ...]

    def __new__(cls, code: int, meaning: str = "", remedy: str = "", *causes: str) -> Self:
        """Makes one member out of one row of the table."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        member.remedy = remedy
        member.causes = causes
        return member

    LLM_SUCCESS = 0, "the call did what it was asked to do"
    LLM_FAILED = (
        0xFFFFFFFF,
        "the call failed for a reason without a code of its own",
        "",
        "the instance is finalized, or this is a forked child of its process",
        "an address to listen at can't be bound",
        "no file descriptors are left",
        "a peer sent what can't be true",
        "an engine (HIXL, NIXL) failed",
    )
    LLM_WAIT_PROCESS_TIMEOUT = (
        _ENGINE + 1,
        "waiting for the request took too long",
        "raise sync_kv_timeout, or find out why the peer is slow",
    )
    LLM_KV_CACHE_NOT_EXIST = (
        _ENGINE + 2,
        "there is no such cache, or no such key",
        "check the key, and that its owner has neither freed nor unregistered the cache",
        "a name or key that its owner does not have (yet)",
        "a request key that a pull has consumed",
        "a cache that was freed or unregistered, on either side",
        "a cache whose owner keeps it from peers",
    )
    LLM_REPEAT_REQUEST = _ENGINE + 3, "the request was made before"
    LLM_REQUEST_ALREADY_COMPLETED = _ENGINE + 4, "the request is complete already"
    LLM_PARAM_INVALID = (
        _ENGINE + 5,
        "an argument is invalid, or arguments contradict each other",
        "",
        "block or row ids out of range, duplicate destination blocks",
        "an empty layer range",
        "two caches with other block sizes, tensor counts or dtypes",
        "an option that there is not, a wrong value of one, or two peers with other modes",
        "registered addresses that are not mapped, or not on that device",
    )
    LLM_ENGINE_FINALIZED = (
        _ENGINE + 6,
        "the instance is finalized",
        "call init() first",
    )
    LLM_NOT_YET_LINK = (
        _ENGINE + 7,
        "there is no usable link to that peer",
        "link to the peer first, and look at the status that link_clusters() returned",
        "no link was made, or a side has unlinked",
        "the peer's process has ended, or its host does not answer any more",
        "the link was lost, and it is the peer that has to dial again",
    )
    LLM_ALREADY_LINK = (
        _ENGINE + 8,
        "there is a link to that peer already",
        "unlink it first",
        "link_clusters() for a peer that is linked",
        "another instance with the same cluster id is linked",
    )
    LLM_LINK_FAILED = (
        _ENGINE + 9,
        "the link could not be made",
        "check that the peer is initialised, and listens on the address given",
        "nobody listens at the address",
        "the two sides have other versions of this library",
        "the link secrets differ, or only one side has one",
    )
    LLM_UNLINK_FAILED = (
        _ENGINE + 10,
        "the link could not be taken down in agreement with the peer",
        "unlink with force=True on both sides",
        "unlinking without force, and the peer is gone",
    )
    LLM_NOTIFY_PROMPT_UNLINK_FAILED = _ENGINE + 11, "the peer could not be told of the unlink"
    LLM_CLUSTER_NUM_EXCEED_LIMIT = _ENGINE + 12, "too many clusters in one call"
    LLM_PROCESSING_LINK = (
        _ENGINE + 13,
        "the link is being made",
        "try again later",
    )
    LLM_DEVICE_OUT_OF_MEMORY = (
        _ENGINE + 14,
        "the device has no memory left for this",
        "",
        "the Ascend runtime had no memory for a call",
    )
    LLM_PREFIX_ALREADY_EXIST = _ENGINE + 15, "the prefix exists already"
    LLM_PREFIX_NOT_EXIST = _ENGINE + 16, "there is no such prefix"
    LLM_SEQ_LENOVERLIMIT = _ENGINE + 17, "the sequence is too long"
    LLM_NO_FREE_BLOCK = _ENGINE + 18, "no block is free"
    LLM_BLOCKS_OUT_OF_MEMORY = _ENGINE + 19, "there is no memory left for blocks"
    LLM_EXIST_LINK = (
        _ENGINE + 24,
        "there are links, and the call needs that there are none",
        "unlink every peer first",
        "switch_role() to another address while peers are linked",
        "switch_role() while a communicator is being linked",
    )
    LLM_FEATURE_NOT_ENABLED = (
        _ENGINE + 25,
        "the feature is not enabled, or not supported here",
        "",
        "a transport that this machine or the peer does not have",
        "an NPU that torch_npu can't use",
        "a package of an extra (secret, nixl, metrics, tracing, plots) is not installed",
    )
    LLM_TIMEOUT = (
        _ENGINE + 26,
        "the call did not finish in its time",
        "give it more time, or find out why the peer is slow or gone",
        "the peer is stopped, overloaded, or behind a slow connection",
        "a time limit that is too short for the bytes",
        "a synchronizer that never lets a layer go",
    )
    LLM_LINK_BUSY = (
        _ENGINE + 27,
        "the link is in use by another call",
        "try again later",
        "unlinking while the peer moves bytes on the link",
        "another pull of the same request key is under way",
        "more leases or requests of one peer than an instance takes",
        "a peer may still write to memory that finalize() should give back",
    )
    LLM_OUT_OF_MEMORY = (
        _ENGINE + 28,
        "there is no memory left for this",
        "free caches, or configure a larger pool",
        "a pool that is too small, or in pieces",
        "the container's or the machine's limit",
        "the device is full",
    )
    LLM_DEVICE_MEM_ERROR = (
        507053,
        "the device reported a memory error",
        "",
        "the device's driver or memory failed",
        "a forked child uses an NPU that its parent has used",
    )
    LLM_SUSPECT_REMOTE_ERROR = (
        507057,
        "the peer, or the way to it, is suspected to be broken",
        "unlink with force=True, and link again once the peer is back",
        "the Ascend runtime reports that a peer's device does not answer",
    )
    LLM_UNKNOWN_ERROR = (
        -1,
        "unknown error",
        "",
        "an exception of the program's own, such as its synchronizer's, ended a background task",
    )
