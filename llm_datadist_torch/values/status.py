# SPDX-License-Identifier: Apache-2.0
"""The exceptions made of the table of status codes, and the reference's helpers around both."""

from __future__ import annotations

from typing import Any, ClassVar

from llm_datadist_torch.values.status_codes import LLMStatusCode as LLMStatusCode


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


def message_of(error: BaseException) -> str:
    """What an error says, without the remedy that ``str()`` of an :class:`LLMException` adds."""
    return str(error.args[0]) if error.args else str(error)


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


def exception_class(status: LLMStatusCode) -> type[LLMException]:
    """The class of the exceptions that have a status."""
    return _EXCEPTION_OF_STATUS.get(status, LLMException)


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
    return exception_class(status)(
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
