# SPDX-License-Identifier: Apache-2.0
"""The public names of what an instance works with; whatever moves bytes is loaded with them.

The package loads all of them when one is first used. The other public names are in
:mod:`llm_datadist_torch.public`.
"""

from llm_datadist_torch.api.cache_manager import CacheManager as CacheManager
from llm_datadist_torch.api.layers import LayerPull as LayerPull
from llm_datadist_torch.api.layers import LayerPush as LayerPush
from llm_datadist_torch.api.node import Node as Node
from llm_datadist_torch.api.opening import open as open  # noqa: A004
from llm_datadist_torch.api.peer import Peer as Peer
from llm_datadist_torch.api.transfer import PreparedTransfer as PreparedTransfer
from llm_datadist_torch.caches.cache import Cache as Cache
from llm_datadist_torch.links.info import LinkInfo as LinkInfo
from llm_datadist_torch.links.work import CacheTask as CacheTask
