# SPDX-License-Identifier: Apache-2.0
"""Second forms of a public call: the same parameters, written once, and another way to wait."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


def same_parameters(
    first: Callable[Concatenate[S, P], object],
) -> Callable[[Callable[[S, dict[str, Any]], R]], Callable[Concatenate[S, P], R]]:
    """Decorate a method so that it takes the parameters of another one.

    ``help()``, ``inspect.signature`` and type checkers show the parameters of ``first`` and the
    result of the decorated method.

    Args:
        first: The method whose parameters are used.

    Returns:
        A decorator for a method that gets ``self`` and the arguments as a dict, defaults included.
    """
    signature = inspect.signature(first)

    def decorate(second: Callable[[S, dict[str, Any]], R]) -> Callable[Concatenate[S, P], R]:
        def bind(*args: Any, **kwargs: Any) -> tuple[S, dict[str, Any]]:  # noqa: ANN401
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            return given.pop("self"), given

        if inspect.iscoroutinefunction(second):

            @functools.wraps(second)
            async def call(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401
                return await second(*bind(*args, **kwargs))

        else:

            @functools.wraps(second)
            def call(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401
                return second(*bind(*args, **kwargs))

        result = inspect.signature(second).return_annotation
        call.__dict__["__signature__"] = signature.replace(return_annotation=result)
        call.__annotations__ = {**first.__annotations__, "return": result}
        return cast("Callable[Concatenate[S, P], R]", call)

    return decorate
