# SPDX-License-Identifier: Apache-2.0
"""Where the kernel keeps processes apart: one warning with the remedy, and it still works."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.peers import Peer, Ref

pytestmark = pytest.mark.same_on_every_device

OK = ("LLM_SUCCESS", ["LLM_SUCCESS"])
NOBODY, SOMEBODY = 65534, 65533


@pytest.mark.needs_root
@pytest.mark.parametrize("kind", ["allocated", "tensors", "ints"])
@pytest.mark.parametrize(
    ("users", "diagnosis"),
    [
        ((NOBODY, SOMEBODY), f"belongs to user {NOBODY}, this one to {SOMEBODY}; run both as one"),
        ((NOBODY, NOBODY), "CAP_SYS_PTRACE"),  # who has changed user can't be traced by anybody
    ],
    ids=["other-user", "undumpable"],
)
def test_transfers_go_on_through_the_control_connection(
    peers: Callable[[], Peer], kind: str, users: tuple[int, int], diagnosis: str
) -> None:
    owner, puller = peers(), peers()
    owner.call("become", users[0])
    puller.call("become", users[1])
    puller.call("note_paths")
    port = owner.call("start", 1, device="cpu")
    puller.call("start", 2, device="cpu")
    assert puller.call("link", 1, port) == OK
    owner.call("make", kind, "source", 2, 4, 256, paged=True, keys=BlocksCacheKey(1))
    puller.call("allocate", "target", 2, 4, 256, paged=True)
    owner.call("paint", "source", 40)
    puller.call("paint", "target", 90)
    for _ in range(2):
        assert (
            puller.call("attempt", "pull_blocks", BlocksCacheKey(1), Ref("target"), [0, 1], [3, 2])
            is None
        )
    assert puller.call("colours", "target") == [40, 90]
    taken, warnings = puller.call("noted")
    assert taken == ["relay", "relay"]
    (warning,) = [text for text in warnings if "process-memory" in text]
    assert diagnosis in warning


def test_the_reason_is_in_the_link(peers: Callable[[], Peer]) -> None:
    """Registered tensors go another way, allocated caches as before; links() says why."""
    owner, puller = peers(), peers()
    puller.call("be_forbidden_by_yama")
    port = owner.call("start", 1, device="cpu")
    puller.call("start", 2, device="cpu")
    assert puller.call("link", 1, port) == OK
    owner.call("make", "tensors", "source", 2, 4, 256, paged=True, keys=BlocksCacheKey(1))
    puller.call("allocate", "target", 2, 4, 256, paged=True)
    owner.call("paint", "source", 40)
    puller.call("run", "pull_blocks", BlocksCacheKey(1), Ref("target"), [0], [3])
    assert puller.call("colours", "target") == [0, 40]
    reason = puller.call("reason", 1)
    assert reason.startswith("same host; not by process-memory: ")
    assert "ptrace_scope is 1" in reason
    assert "LLMConfig.allow_ptrace = True" in reason


def test_allowing_it_is_asked_for(peers: Callable[[], Peer]) -> None:
    """Yama hears of it where the option is set, and only there."""
    for allowed in (False, True):
        peer = peers()
        peer.call("note_prctl")
        options = {"llm.AllowPtrace": "1"} if allowed else {}
        peer.call("start", 1, device="cpu", options=options)
        assert peer.call("noted_prctl") == ([(0x59616D61, 2**64 - 1)] if allowed else [])
