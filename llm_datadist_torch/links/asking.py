# SPDX-License-Identifier: Apache-2.0
"""``request`` and ``send``: what the program of one instance says to that of another."""

from __future__ import annotations

from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.links.questions import check_payload
from llm_datadist_torch.serving.messages import Answer, Question
from llm_datadist_torch.values.checks import check_timeout_ms, check_uint64
from llm_datadist_torch.values.status import LLMStatusCode, error_for


def request(instance: Instance, peer: int, payload: bytes, timeout: int | None) -> bytes:
    """Ask a peer, and wait for its answer; see ``LLMDataDist.request``."""
    check_uint64("remote_cluster_id", peer)
    check_payload("payload", payload)
    deadline = instance.deadline(None if timeout is None else check_timeout_ms(timeout))
    link = instance.links.use(peer, deadline)
    reply, _ = link.request(Question(payload), deadline)
    if not isinstance(reply, Answer):
        raise error_for(
            LLMStatusCode.LLM_FAILED, f"unexpected answer {type(reply).__name__}", peer=peer
        )
    return reply.payload


def send(instance: Instance, peer: int, payload: bytes) -> None:
    """Send a peer something, without waiting for an answer; see ``LLMDataDist.send``."""
    check_uint64("remote_cluster_id", peer)
    check_payload("payload", payload)
    deadline = instance.deadline(None)
    instance.links.use(peer, deadline).send(Question(payload), deadline)
