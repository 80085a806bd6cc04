# SPDX-License-Identifier: Apache-2.0
"""What an initialised ``LLMDataDist`` works with: caches, links and transports.

This is most of the package. The first ``LLMDataDist.init`` loads it, so that a program which only
names the class, to configure it or to catch its errors, does not.
"""

from llm_datadist_torch.api import statistics as statistics
from llm_datadist_torch.api.on_device import manager_of as manager_of
from llm_datadist_torch.links import asking as asking
from llm_datadist_torch.links import communicating as communicating
from llm_datadist_torch.links import linking as linking
from llm_datadist_torch.links.info import LinkInfo as LinkInfo
from llm_datadist_torch.links.instance import Instance as Instance
from llm_datadist_torch.observe import html as html
from llm_datadist_torch.observe import metrics as metrics
from llm_datadist_torch.observe import tracing as tracing
