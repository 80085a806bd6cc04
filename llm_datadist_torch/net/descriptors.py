# SPDX-License-Identifier: Apache-2.0
"""Whether this process may open more descriptors, to say so before it tries."""

from __future__ import annotations

import os
import resource

from llm_datadist_torch.values.status import LLMStatusCode, error_for

FOR_AN_INSTANCE = 32
FOR_A_LINK = 16
"""What is looked for. An instance takes about 12, a link 4 where it is dialed and 1 at the peer."""


def lack_of_descriptors(count: int) -> str:
    """Why so many descriptors can't be opened now; "" if they can. Takes microseconds."""
    opened: list[int] = []
    try:
        # Not counted in /proc: that takes the longer the more there are.
        while len(opened) < count:
            opened.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"{len(opened)} descriptors are left, {count} are needed ({error.strerror}): the"
            f" process may have {soft} (RLIMIT_NOFILE), and can raise that to {hard}; `ulimit -n`"
            " before it starts, or resource.setrlimit()"
        )
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return ""


def need_descriptors(count: int, op: str) -> None:
    """Check that so many descriptors can be opened.

    Raises:
        LLMException: LLM_FAILED, they can't.
    """
    lack = lack_of_descriptors(count)
    if lack:
        raise error_for(LLMStatusCode.LLM_FAILED, lack, op=op)
