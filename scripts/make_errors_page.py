# SPDX-License-Identifier: Apache-2.0
"""Makes docs/errors.md from the table of status codes: ``python scripts/make_errors_page.py``."""

from __future__ import annotations

import sys
from pathlib import Path

from llm_datadist_torch.values.status import LLMStatusCode, exception_class

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"

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


def _classes(code: LLMStatusCode) -> str:
    cls = exception_class(code)
    builtin = [base.__name__ for base in cls.__mro__ if base.__module__ == "builtins"]
    others = [name for name in builtin if name not in ("object", "BaseException", "Exception")]
    return f"`{cls.__name__}`, which is also " + ", ".join(f"`{name}`" for name in others)


def _section(code: LLMStatusCode) -> str:
    causes = "".join(f"- {_sentence(cause)}\n" for cause in code.causes)
    return (
        f"\n## {code.name}\n\n{_sentence(code.meaning)} Value {int(code):#x}.\n\n"
        f"Raised as {_classes(code)}.\n\nTypical causes:\n\n{causes}\n"
        f"Fix: {_sentence(code.remedy) if code.remedy else _NO_REMEDY}\n"
    )


def page() -> str:
    """The text of docs/errors.md."""
    failures = [code for code in LLMStatusCode if code != LLMStatusCode.LLM_SUCCESS]
    sections = "".join(_section(code) for code in failures if code.causes)
    rows = "".join(
        f"| `{code.name}` | {int(code):#x} | {code.meaning} |\n"
        for code in failures
        if not code.causes
    )
    return _HEAD + sections + _REFERENCE_ONLY + rows


def main() -> int:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
