# SPDX-License-Identifier: Apache-2.0
"""How commands look at an instance in another process: by a link of their own."""

from __future__ import annotations

from llm_datadist_torch.api.node import Node
from llm_datadist_torch.api.opening import open as open_node
from llm_datadist_torch.links.questions import STATS_QUERY
from llm_datadist_torch.observe.stats import Stats
from llm_datadist_torch.values.status import LLMParamError

_CONNECT_S = 5.0
_ANSWER_MS = 5000


def look_at(node: Node, peer: int) -> Stats:
    """What an instance is and has done; ``connect`` has made the link.

    Raises:
        LLMException: It does not answer, or is lost.
    """
    return Stats.from_json(node.datadist.request(peer, STATS_QUERY, timeout=_ANSWER_MS))


def connect(address: str, *, listen: str | None = None, device: str = "cpu") -> tuple[Node, int]:
    """Link to the instance, in whichever mode it is.

    Args:
        address: Its host and port.
        listen: Where the node of this process listens. None: nowhere.
        device: What that node's ``Placement.DEVICE`` is.
    """
    try:
        return _connect(address, listen, device, remote_accessible=True)
    except LLMParamError:
        return _connect(address, listen, device, remote_accessible=False)


def _connect(
    address: str, listen: str | None, device: str, *, remote_accessible: bool
) -> tuple[Node, int]:
    node = open_node(device=device, listen=listen, remote_accessible=remote_accessible)
    try:
        return node, node.connect(address, timeout_s=_CONNECT_S).cluster_id
    except BaseException:
        node.close()
        raise
