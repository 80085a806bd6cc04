# SPDX-License-Identifier: Apache-2.0
"""The public API as text: ``python -m tests.public_api`` writes tests/public_api.txt anew.

Every name that a program may use, with its signature and defaults, so that a change of the API is
seen, and read, as a change of that file.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import llm_datadist_torch
from llm_datadist_torch.compat import tree

FILE = Path(__file__).with_name("public_api.txt")
PACKAGE = llm_datadist_torch.__name__
# The modules besides the top level whose names programs import.
MODULES = ("api.cache_manager", "api.datadist", "ops", "compat", "compat.switch")


def exports(module: ModuleType) -> dict[str, Any]:
    """The public names of a module: ``__all__``, or else what it defines itself."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
    return {name: getattr(module, name) for name in sorted(names)}


def _shown(value: object) -> str:
    """An annotation, or a default, as it is written."""
    if isinstance(value, str):
        return value
    return value.__name__ if isinstance(value, type) else str(value)


def _default(value: object) -> str:
    return str(value) if isinstance(value, enum.Enum) else repr(value)


def signature(function: Any) -> str:
    text: list[str] = []
    parameters = list(inspect.signature(function).parameters.values())
    starred = False
    for at, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            text.append("*")
            starred = True
        starred = starred or parameter.kind is parameter.VAR_POSITIONAL
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        one = stars.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            one += f": {_shown(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            one += f" = {_default(parameter.default)}"
        text.append(one)
        follows = parameters[at + 1].kind if at + 1 < len(parameters) else None
        if parameter.kind is parameter.POSITIONAL_ONLY is not follows:
            text.append("/")
    returned = inspect.signature(function).return_annotation
    arrow = "" if returned is inspect.Signature.empty else f" -> {_shown(returned)}"
    return f"({', '.join(text)}){arrow}"


def _own(cls: type, public: set[type]) -> dict[str, Any]:
    """What a class has of its own, or from bases that are not public themselves."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(PACKAGE) and (base is cls or base not in public):
            found |= vars(base)
    return found


def _member(name: str, value: Any, cls: type) -> str:
    if isinstance(value, property):
        settable = " (settable)" if value.fset else ""
        return f"{name}: {_shown(value.fget.__annotations__['return'])}{settable}"
    if isinstance(value, (classmethod, staticmethod)):
        return f"{type(value).__name__} {name}{signature(value.__func__)}"
    if inspect.isfunction(value):
        return f"{name}{signature(value)}"
    if hasattr(type(value), "__get__"):  # an option of LLMConfig
        return f"{name} = {_default(value.__get__(cls(), cls))} (settable)"
    return f"{name} = {_default(value)}"


def _members(cls: type, public: set[type]) -> Iterator[str]:
    found = _own(cls, public)
    if "__init__" in found:
        yield f"    __init__{signature(found['__init__'])}"
    yield from (f"    {name}" for name in ("__enter__", "__await__") if name in found)
    for name in sorted(found, key=str.lower):
        if not name.startswith("_"):
            yield f"    {_member(name, found[name], cls)}"


def _described(name: str, value: Any, public: set[type]) -> Iterator[str]:
    if not isinstance(value, type):
        is_function = inspect.isfunction(value)
        yield f"def {name}{signature(value)}" if is_function else f"{name} = {_default(value)}"
        return
    if value.__name__ != name:
        yield f"{name} is {value.__name__}"
        return
    bases = [base for base in value.__mro__[1:] if base in public or base.__module__ == "builtins"]
    bases = [base for base in bases if not any(base in other.__mro__[1:] for other in bases)]
    inside = ", ".join(base.__name__ for base in bases if base is not object)
    yield f"class {name}({inside})" if inside else f"class {name}"
    if issubclass(value, enum.Enum):
        for member in value:
            yield f"    {member.name} = {member.value!r}"
    else:
        yield from _members(value, public)


def _tree_modules() -> Iterator[tuple[str, ModuleType]]:
    """The modules of ``llm_datadist``, by the names that programs know."""
    yield "llm_datadist", tree
    for found in pkgutil.walk_packages(tree.__path__, tree.__name__ + "."):
        name = found.name.replace(tree.__name__, "llm_datadist")
        yield name, importlib.import_module(found.name)


def lines() -> Iterator[str]:
    top = exports(llm_datadist_torch)
    public = {value for value in top.values() if isinstance(value, type)}
    described: set[int] = set()
    modules = [(PACKAGE, llm_datadist_torch)]
    modules += [(f"{PACKAGE}.{n}", importlib.import_module(f"{PACKAGE}.{n}")) for n in MODULES]
    for title, module in [*modules, *_tree_modules()]:
        yield f"## {title}"
        known = []
        for name, value in exports(module).items():
            if id(value) in described and getattr(value, "__name__", None) == name:
                known.append(name)
                continue
            yield from _described(name, value, public)
            if callable(value):
                described.add(id(value))
        if known:
            yield f"as above: {' '.join(known)}"
        yield ""


def text() -> str:
    return "\n".join(lines()).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
