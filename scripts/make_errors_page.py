# SPDX-License-Identifier: Apache-2.0
"""Makes docs/errors.md and docs/zh/errors.md: ``python scripts/make_errors_page.py``.

Both come from the table of status codes; scripts/errors_zh.py has its texts in Chinese.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

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


def _classes(code: LLMStatusCode) -> tuple[str, list[str]]:
    """The class of a code, and the classes of Python that it is, too."""
    cls = exception_class(code)
    builtin = [base.__name__ for base in cls.__mro__ if base.__module__ == "builtins"]
    others = [name for name in builtin if name not in ("object", "BaseException", "Exception")]
    return f"`{cls.__name__}`", [f"`{name}`" for name in others]


def _section(code: LLMStatusCode) -> str:
    causes = "".join(f"- {_sentence(cause)}\n" for cause in code.causes)
    name, builtin = _classes(code)
    return (
        f"\n## {code.name}\n\n{_sentence(code.meaning)} Value {int(code):#x}.\n\n"
        f"Raised as {name}, which is also {', '.join(builtin)}.\n\nTypical causes:\n\n{causes}\n"
        f"Fix: {_sentence(code.remedy) if code.remedy else _NO_REMEDY}\n"
    )


def _chinese_section(code: LLMStatusCode) -> str:
    causes = "".join(f"- {_chinese(cause)}\n" for cause in code.causes)
    name, builtin = _classes(code)
    return (
        f"\n## {code.name}\n\n{_chinese(code.meaning)}值为 {int(code):#x}。\n\n"
        f"以 {name} 抛出,它同时也是 {'、'.join(builtin)}。\n\n常见原因:\n\n{causes}\n"
        f"解决办法:{_chinese(code.remedy) if code.remedy else errors_zh.NO_REMEDY}\n"
    )


def pages() -> dict[Path, str]:
    """The text of each page."""
    failures = [code for code in LLMStatusCode if code != LLMStatusCode.LLM_SUCCESS]
    returned = [code for code in failures if code.causes]
    others = [code for code in failures if not code.causes]

    def rows(translated: Callable[[str], str]) -> str:
        return "".join(
            f"| `{code.name}` | {int(code):#x} | {translated(code.meaning)} |\n" for code in others
        )

    english = _HEAD + "".join(map(_section, returned)) + _REFERENCE_ONLY + rows(str)
    chinese = errors_zh.HEAD + "".join(map(_chinese_section, returned))
    chinese += errors_zh.REFERENCE_ONLY + rows(errors_zh.TEXTS.__getitem__)
    return {DOCS / "errors.md": english, DOCS / "zh" / "errors.md": chinese}


def main() -> int:
    """Writes the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
