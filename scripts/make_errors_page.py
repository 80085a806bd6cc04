# SPDX-License-Identifier: Apache-2.0
"""Makes docs/errors.md and docs/zh/errors.md: ``python scripts/make_errors_page.py``.

Both come from the table of status codes; scripts/errors_zh.py has its texts in Chinese.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llm_datadist_torch.values.status import LLMStatusCode, exception_class

sys.path.insert(0, str(Path(__file__).resolve().parent))

import errors_zh

DOCS = Path(__file__).resolve().parent.parent / "docs"

_HEAD = """# Errors

A wrong type is a `TypeError` and a number outside its width a `ValueError`, as in the reference.
Every other failure is an `LLMException`. It has a `status_code`, and where they are known `op`,
`peer`, `cache_id` and `remedy`. Its text names the value that was wrong, the limit, and the remedy.
Its class follows from its status code, and is one of Python's classes, too:

```python
import llm_datadist_torch as ld

with ld.open() as node:
    try:
        node.connect("127.0.0.1:1", timeout_s=0.2)
    except ConnectionError as error:
        print(type(error).__name__, error.status_code, error)
```

Calls that return a status (`link_clusters`, `unlink_clusters`, `CacheTask.synchronize`) return the
same codes.

This page is made by `python scripts/make_errors_page.py` from `LLMStatusCode`, the one table in the
code, which programs can read too: `LLMStatusCode.LLM_TIMEOUT.meaning`, `.remedy` and `.causes`.
"""

_NO_REMEDY = "What the error's text says: it names the value, the limit and the remedy."

_REFERENCE_ONLY = """
## Codes that this library never returns

They are in the table because programs written for the reference name them.

| code | value | meaning |
|---|---|---|
"""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _chinese(text: str) -> str:
    return errors_zh.TEXTS[text] + "。"


class Language(NamedTuple):
    """How a page says things.

    Attributes:
        head: What comes before the sections.
        section: Of one code; a format string.
        no_remedy: Where a code has no remedy of its own.
        reference_only: What comes before the codes that are never returned.
        phrase: Makes a text of the table one of this language.
        sentence: The same, as a sentence.
        comma: Between members of a list.
    """

    head: str
    section: str
    no_remedy: str
    reference_only: str
    phrase: Callable[[str], str]
    sentence: Callable[[str], str]
    comma: str


_SECTION = """
## {code}

{meaning} Value {value}.

Raised as {name}, which is also {builtin}.

Typical causes:

{causes}
Fix: {remedy}
"""

ENGLISH = Language(_HEAD, _SECTION, _NO_REMEDY, _REFERENCE_ONLY, str, _sentence, ", ")
CHINESE = Language(
    errors_zh.HEAD,
    errors_zh.SECTION,
    errors_zh.NO_REMEDY,
    errors_zh.REFERENCE_ONLY,
    errors_zh.TEXTS.__getitem__,
    _chinese,
    "、",
)


def _classes(code: LLMStatusCode) -> tuple[str, list[str]]:
    """The class of a code, and the classes of Python that it is, too."""
    cls = exception_class(code)
    builtin = [base.__name__ for base in cls.__mro__ if base.__module__ == "builtins"]
    others = [name for name in builtin if name not in ("object", "BaseException", "Exception")]
    return f"`{cls.__name__}`", [f"`{name}`" for name in others]


def _section(code: LLMStatusCode, words: Language) -> str:
    name, builtin = _classes(code)
    return words.section.format(
        code=code.name,
        value=f"{int(code):#x}",
        meaning=words.sentence(code.meaning),
        name=name,
        builtin=words.comma.join(builtin),
        causes="".join(f"- {words.sentence(cause)}\n" for cause in code.causes),
        remedy=words.sentence(code.remedy) if code.remedy else words.no_remedy,
    )


def _page(words: Language) -> str:
    failures = [code for code in LLMStatusCode if code != LLMStatusCode.LLM_SUCCESS]
    sections = "".join(_section(code, words) for code in failures if code.causes)
    rows = "".join(
        f"| `{code.name}` | {int(code):#x} | {words.phrase(code.meaning)} |\n"
        for code in failures
        if not code.causes
    )
    return words.head + sections + words.reference_only + rows


def pages() -> dict[Path, str]:
    """The text of each page."""
    return {DOCS / "errors.md": _page(ENGLISH), DOCS / "zh" / "errors.md": _page(CHINESE)}


def main() -> int:
    """Writes the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
