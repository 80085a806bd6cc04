# SPDX-License-Identifier: Apache-2.0
"""One table of status codes (name, code, meaning, remedy), and the exceptions made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llm_datadist_torch.values.enums import NamedIntEnum

if TYPE_CHECKING:
    from typing_extensions import Self

_ENGINE = 0x5010B000


class LLMStatusCode(NamedIntEnum):
    """The table of status codes (reference API, 2.1): each row is code, meaning, remedy.

    An empty remedy means that only the place that raises can say what to do.
    """

    meaning: str
    remedy: str

    def __new__(cls, code: int, meaning: str = "", remedy: str = "") -> Self:
        """Makes one member out of one row of the table."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        member.remedy = remedy
        return member

    LLM_SUCCESS = 0, "the call did what it was asked to do"
    LLM_FAILED = 0xFFFFFFFF, "the call failed for a reason without a code of its own"
    LLM_WAIT_PROCESS_TIMEOUT = (
        _ENGINE + 1,
        "waiting for the request took too long",
        "raise sync_kv_timeout, or find out why the peer is slow",
    )
    LLM_KV_CACHE_NOT_EXIST = (
        _ENGINE + 2,
        "there is no such cache, or no such key",
        "check the key, and that its owner has neither freed nor unregistered the cache",
    )
    LLM_REPEAT_REQUEST = _ENGINE + 3, "the request was made before"
    LLM_REQUEST_ALREADY_COMPLETED = _ENGINE + 4, "the request is complete already"
    LLM_PARAM_INVALID = _ENGINE + 5, "an argument is invalid, or arguments contradict each other"
    LLM_ENGINE_FINALIZED = _ENGINE + 6, "the instance is finalized", "call init() first"
    LLM_NOT_YET_LINK = (
        _ENGINE + 7,
        "there is no usable link to that peer",
        "link to the peer first, and look at the status that link_clusters() returned",
    )
    LLM_ALREADY_LINK = _ENGINE + 8, "there is a link to that peer already", "unlink it first"
    LLM_LINK_FAILED = (
        _ENGINE + 9,
        "the link could not be made",
        "check that the peer is initialised, and listens on the address given",
    )
    LLM_UNLINK_FAILED = (
        _ENGINE + 10,
        "the link could not be taken down in agreement with the peer",
        "unlink with force=True on both sides",
    )
    LLM_NOTIFY_PROMPT_UNLINK_FAILED = _ENGINE + 11, "the peer could not be told of the unlink"
    LLM_CLUSTER_NUM_EXCEED_LIMIT = _ENGINE + 12, "too many clusters in one call"
    LLM_PROCESSING_LINK = _ENGINE + 13, "the link is being made", "try again later"
    LLM_DEVICE_OUT_OF_MEMORY = _ENGINE + 14, "the device has no memory left for this"
    LLM_PREFIX_ALREADY_EXIST = _ENGINE + 15, "the prefix exists already"
    LLM_PREFIX_NOT_EXIST = _ENGINE + 16, "there is no such prefix"
    LLM_SEQ_LENOVERLIMIT = _ENGINE + 17, "the sequence is too long"
    LLM_NO_FREE_BLOCK = _ENGINE + 18, "no block is free"
    LLM_BLOCKS_OUT_OF_MEMORY = _ENGINE + 19, "there is no memory left for blocks"
    LLM_EXIST_LINK = (
        _ENGINE + 24,
        "there are links, and the call needs that there are none",
        "unlink every peer first",
    )
    LLM_FEATURE_NOT_ENABLED = _ENGINE + 25, "the feature is not enabled, or not supported here"
    LLM_TIMEOUT = (
        _ENGINE + 26,
        "the call did not finish in its time",
        "give it more time, or find out why the peer is slow or gone",
    )
    LLM_LINK_BUSY = _ENGINE + 27, "the link is in use by another call", "try again later"
    LLM_OUT_OF_MEMORY = (
        _ENGINE + 28,
        "there is no memory left for this",
        "free caches, or configure a larger pool",
    )
    LLM_DEVICE_MEM_ERROR = 507053, "the device reported a memory error"
    LLM_SUSPECT_REMOTE_ERROR = (
        507057,
        "the peer, or the way to it, is suspected to be broken",
        "unlink with force=True, and link again once the peer is back",
    )
    LLM_UNKNOWN_ERROR = -1, "unknown error"


class LLMException(RuntimeError):  # noqa: N818 (the reference's name)
    """Base of every typed error of this package.

    Attributes:
        op: name of the operation that failed, None where it is not known.
        peer: cluster id of the peer concerned, None if there is none.
        cache_id: id of the cache concerned, None if there is none.
        remedy: what to do about it; part of `str()`.

    Instances can be copied and pickled, so they pass unchanged between processes.
    """

    default_status: ClassVar[LLMStatusCode] = LLMStatusCode.LLM_SUCCESS

    def __init__(
        self,
        *args: object,
        status_code: LLMStatusCode = LLMStatusCode.LLM_SUCCESS,
        op: str | None = None,
        peer: int | None = None,
        cache_id: int | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(*args)
        # The reference's default is success; a class that stands for a failure keeps its own.
        is_default = status_code == LLMStatusCode.LLM_SUCCESS
        self._status_code = self.default_status if is_default else status_code
        self.op = op
        self.peer = peer
        self.cache_id = cache_id
        self.remedy = remedy

    @property
    def status_code(self) -> LLMStatusCode:
        """The status code; LLM_SUCCESS where a plain LLMException was made without one."""
        return self._status_code

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} Remedy: {self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError, a base of some subclasses, would otherwise rebuild from its own errno fields.
        return type(self), self.args, self.__dict__.copy()


class LLMParamError(LLMException, ValueError):
    """An argument is invalid, or arguments contradict each other."""

    default_status = LLMStatusCode.LLM_PARAM_INVALID


class LLMCacheNotFoundError(LLMException, LookupError):
    """There is no such cache or key."""

    default_status = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


class LLMNotLinkedError(LLMException, ConnectionError):
    """There is no usable link to the peer."""

    default_status = LLMStatusCode.LLM_NOT_YET_LINK


class LLMPeerLostError(LLMNotLinkedError):
    """The link existed, but the peer is gone or no longer answers."""

    default_status = LLMStatusCode.LLM_NOT_YET_LINK


class LLMLinkError(LLMException, ConnectionError):
    """A link could not be made or taken down, or stands in the way."""

    default_status = LLMStatusCode.LLM_LINK_FAILED


class LLMTimeoutError(LLMException, TimeoutError):
    """The call did not finish in its time; nothing of it still runs."""

    default_status = LLMStatusCode.LLM_TIMEOUT


class LLMOutOfMemoryError(LLMException, MemoryError):
    """Memory could not be had.

    Attributes:
        requested_bytes: how much was asked for, None if unknown.
        free_bytes: how much was free in all, None if unknown.
        largest_free_bytes: largest free stretch, None if unknown.
    """

    default_status = LLMStatusCode.LLM_OUT_OF_MEMORY

    def __init__(
        self,
        *args: object,
        status_code: LLMStatusCode = LLMStatusCode.LLM_OUT_OF_MEMORY,
        op: str | None = None,
        peer: int | None = None,
        cache_id: int | None = None,
        remedy: str | None = None,
        requested_bytes: int | None = None,
        free_bytes: int | None = None,
        largest_free_bytes: int | None = None,
    ) -> None:
        super().__init__(
            *args, status_code=status_code, op=op, peer=peer, cache_id=cache_id, remedy=remedy
        )
        self.requested_bytes = requested_bytes
        self.free_bytes = free_bytes
        self.largest_free_bytes = largest_free_bytes


class LLMFeatureNotEnabledError(LLMException):
    """The feature is not enabled, or not supported by what is in use."""

    default_status = LLMStatusCode.LLM_FEATURE_NOT_ENABLED


class LLMLoadError(LLMException, ImportError):
    """This machine can't load the package: torch, Python, glibc or libstdc++ is not what it needs.

    It is an `ImportError` too, for programs that do without the package where it isn't.
    """

    default_status = LLMStatusCode.LLM_FEATURE_NOT_ENABLED


class LLMDeviceError(LLMException):
    """The device reported an error."""

    default_status = LLMStatusCode.LLM_DEVICE_MEM_ERROR


_EXCEPTION_OF_STATUS: dict[LLMStatusCode, type[LLMException]] = {
    LLMStatusCode.LLM_PARAM_INVALID: LLMParamError,
    LLMStatusCode.LLM_KV_CACHE_NOT_EXIST: LLMCacheNotFoundError,
    LLMStatusCode.LLM_PREFIX_NOT_EXIST: LLMCacheNotFoundError,
    LLMStatusCode.LLM_NOT_YET_LINK: LLMNotLinkedError,
    LLMStatusCode.LLM_SUSPECT_REMOTE_ERROR: LLMPeerLostError,
    LLMStatusCode.LLM_LINK_FAILED: LLMLinkError,
    LLMStatusCode.LLM_UNLINK_FAILED: LLMLinkError,
    LLMStatusCode.LLM_ALREADY_LINK: LLMLinkError,
    LLMStatusCode.LLM_EXIST_LINK: LLMLinkError,
    LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED: LLMLinkError,
    LLMStatusCode.LLM_PROCESSING_LINK: LLMLinkError,
    LLMStatusCode.LLM_LINK_BUSY: LLMLinkError,
    LLMStatusCode.LLM_TIMEOUT: LLMTimeoutError,
    LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT: LLMTimeoutError,
    LLMStatusCode.LLM_OUT_OF_MEMORY: LLMOutOfMemoryError,
    LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY: LLMOutOfMemoryError,
    LLMStatusCode.LLM_NO_FREE_BLOCK: LLMOutOfMemoryError,
    LLMStatusCode.LLM_BLOCKS_OUT_OF_MEMORY: LLMOutOfMemoryError,
    LLMStatusCode.LLM_FEATURE_NOT_ENABLED: LLMFeatureNotEnabledError,
    LLMStatusCode.LLM_DEVICE_MEM_ERROR: LLMDeviceError,
}


def error_for(
    status: LLMStatusCode,
    message: str,
    *,
    op: str | None = None,
    peer: int | None = None,
    cache_id: int | None = None,
    remedy: str | None = None,
) -> LLMException:
    """Builds, without raising it, the exception that belongs to a status.

    Args:
        status: the status; statuses without a class of their own give a plain LLMException.
        message: what is wrong, with value and limit. Never formatted again, braces are safe.
        op: name of the operation.
        peer: cluster id of the peer concerned.
        cache_id: id of the cache concerned.
        remedy: what to do about it. None takes the status table's remedy where it has one; "" none.

    Returns:
        The exception to raise.
    """
    return _EXCEPTION_OF_STATUS.get(status, LLMException)(
        message,
        status_code=status,
        op=op,
        peer=peer,
        cache_id=cache_id,
        remedy=(status.remedy or None) if remedy is None else (remedy or None),
    )


def code_2_status(code: int) -> LLMStatusCode:
    """Maps an engine code to its status; whatever is not in the table is LLM_FAILED."""
    if not isinstance(code, int):
        return LLMStatusCode.LLM_FAILED
    try:
        return LLMStatusCode(code)
    except ValueError:
        return LLMStatusCode.LLM_FAILED


def status_meaning(code: int) -> str:
    """Says in words what a status or an engine code means."""
    return code_2_status(code).meaning


class Status:
    """A status code with a question: did it work?"""

    def __init__(self, code: LLMStatusCode) -> None:
        self._code = code

    def is_ok(self) -> bool:
        """Returns whether the code is LLM_SUCCESS."""
        return self._code == LLMStatusCode.LLM_SUCCESS

    @property
    def status_code(self) -> LLMStatusCode:
        """The code itself."""
        return self._code

    def __repr__(self) -> str:
        return f"Status({self._code})"


def handle_llm_status(status: int, func_name: str, other_info: object) -> None:
    """Raises for any engine code but 0.

    Raises:
        LLMException: the class and status that belong to the code.
    """
    if status == LLMStatusCode.LLM_SUCCESS:
        return
    code = code_2_status(status)
    raise error_for(code, f"{func_name} failed, error code is {code}, {other_info}", op=func_name)


def raise_if_false(
    pred: object,
    fmt: str,
    *args: object,
    status_code: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID,
    **kw: object,
) -> None:
    """Raises unless `pred` is true; `fmt` is formatted only if there is something to put in.

    Raises:
        LLMException: the class that belongs to `status_code`.
    """
    if not pred:
        raise error_for(status_code, fmt.format(*args, **kw) if args or kw else fmt)


def raise_if_true(
    pred: object,
    fmt: str,
    *args: object,
    status_code: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID,
    **kw: object,
) -> None:
    """Raises if `pred` is true; otherwise like `raise_if_false`.

    Raises:
        LLMException: the class that belongs to `status_code`.
    """
    raise_if_false(not pred, fmt, *args, status_code=status_code, **kw)
