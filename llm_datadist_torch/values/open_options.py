# SPDX-License-Identifier: Apache-2.0
"""Options of ``open``: from keywords, a dict, a TOML file and the environment."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

from llm_datadist_torch.values.checks import check_isinstance, param_error
from llm_datadist_torch.values.environment import environment_texts
from llm_datadist_torch.values.secret import SECRET_FILE_VARIABLE
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

ENVIRONMENT_PREFIX = "LLM_DATADIST_"
TABLE = "llm_datadist"
"""The table of a TOML file that holds the options, if it has one."""

ConfigLike: TypeAlias = "Mapping[str, object] | str | os.PathLike[str]"

# Variables with the prefix that are read elsewhere.
_OTHER_VARIABLES = {SECRET_FILE_VARIABLE, f"{ENVIRONMENT_PREFIX}RENDEZVOUS"}
_LIKENESS = 0.75  # of a variable to an option, from which on it is taken for a misspelt one


def _flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise ValueError("is neither true nor false")
    return values[text.lower()]


# What a text of the environment becomes. Options that are not here stay texts.
_FROM_TEXT: dict[str, Callable[[str], object]] = {
    "cluster_id": int,
    "device_id": int,
    "timeout_s": float,
    "remote_accessible": _flag,
    "auto_relink": _flag,
    "pool_bytes": int,
    "host_pool_bytes": int,
    "rdma_traffic_class": int,
    "rdma_service_level": int,
}
# What a program has at hand; and the secret, because a process's environment is easily seen.
_NOT_FROM_ENVIRONMENT = {"options", "replace", "link_secret"}


_P = ParamSpec("_P")
_R = TypeVar("_R")


def with_sources(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function with keyword-only options take them from ``config`` and the environment, too.

    Its signature stays what it is, for ``help()``, completion and type checkers.
    """
    known = set(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: _P.args, **given: _P.kwargs) -> _R:
        if args:
            name = function.__name__
            raise TypeError(f"{name}() takes keywords only, such as {name}(cluster_id=1)")
        options: dict[str, Any] = dict(given)
        config = options.pop("config", None)
        collected = collect(options, known, config)
        return function(**collected)  # type: ignore[call-arg]

    return call


def collect(
    given: Mapping[str, Any], known: Iterable[str], config: ConfigLike | None
) -> dict[str, Any]:
    """Put the options of ``open`` together.

    Keywords come before ``config``, and that before the environment.

    Args:
        given: The keywords of the call, without ``config``.
        known: Names of all options.
        config: A mapping, or the path of a TOML file.

    Raises:
        TypeError: ``config`` is neither.
        LLMParamError: An option that there is not, with the nearest that there is; a text of the
            environment that is not what its option needs; a file that can't be read.
        LLMFeatureNotEnabledError: A TOML file, and nothing that reads it (Python 3.10 without
            ``tomli``).
    """
    known = set(known) - {"config"}
    configured = {} if config is None else _from_config(config)
    for source, options in (("open", given), ("config", configured)):
        for name in options:
            if name not in known:
                raise unknown_option(source, name, known)
    return {**_from_environment(known), **configured, **given}


def unknown_option(source: str, name: object, known: Iterable[str]) -> LLMException:
    """The error for an option that there is not."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = (
        f"did you mean {nearest[0]}?" if nearest else f"the options are {', '.join(sorted(known))}."
    )
    return param_error(f"{source} has no option {str(name)!r}", remedy=hint)


def _from_config(config: ConfigLike) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return {str(name): value for name, value in config.items()}
    check_isinstance("config", config, (str, os.PathLike), allow_none=False)
    return _from_toml(Path(config))


def _from_toml(path: Path) -> dict[str, Any]:
    tomllib = _toml_reader()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise param_error(f"config={str(path)!r} can't be read: {error}") from None
    options = document.get(TABLE, document)
    if not isinstance(options, dict):
        raise param_error(f"config={str(path)!r}: {TABLE} is no table", remedy=f"write [{TABLE}].")
    return options


def _toml_reader() -> Any:  # noqa: ANN401 (a module)
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise error_for(
        LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        "this Python can't read TOML (it can from 3.11 on)",
        remedy="pip install tomli, or give config a dict.",
    )


def _from_environment(known: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variable, text in environment_texts(ENVIRONMENT_PREFIX).items():
        if variable in _OTHER_VARIABLES:
            continue
        name = variable[len(ENVIRONMENT_PREFIX) :].lower()
        if name in known - _NOT_FROM_ENVIRONMENT:
            found[name] = _typed(variable, name, text)
        elif name == "link_secret":
            raise param_error(
                f"{variable} is not read, because others may see a process's environment",
                remedy=f"name a file that holds the secret by {SECRET_FILE_VARIABLE}.",
            )
        else:
            _check_not_misspelt(variable, name, known - _NOT_FROM_ENVIRONMENT)
    return found


def _check_not_misspelt(variable: str, name: str, known: set[str]) -> None:
    """Refuse a variable that looks like a misspelt option.

    Others may own variables with this prefix (Kubernetes sets NAME_PORT for each service), so one
    that is like no option is left alone.
    """
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=_LIKENESS)
    if nearest:
        raise param_error(
            f"the environment has {variable}, which is no option",
            remedy=f"did you mean {ENVIRONMENT_PREFIX}{nearest[0].upper()}?",
        )


def _typed(variable: str, name: str, text: str) -> object:
    convert = _FROM_TEXT.get(name, str)
    try:
        return convert(text)
    except ValueError as error:
        raise param_error(f"{variable}={text!r}: {error}") from None
