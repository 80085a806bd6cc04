# SPDX-License-Identifier: Apache-2.0
"""``remap_registered_memory``: checks only, because no way of moving bytes needs a new mapping."""

from __future__ import annotations

from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.serving.peer import LinkState
from llm_datadist_torch.values.checks import param_error, shown
from llm_datadist_torch.values.enums import Memtype
from llm_datadist_torch.values.mem_info import MemInfo
from llm_datadist_torch.values.status import LLMStatusCode, error_for


def check_mem_infos(mem_infos: object) -> None:
    """Check the argument of ``remap_registered_memory`` (reference API, 9.5).

    Raises:
        LLMParamError: Whatever is wrong with it, also a wrong type.
    """
    given = [mem_infos] if isinstance(mem_infos, MemInfo) else mem_infos
    if not isinstance(given, list):
        raise param_error(
            f"mem_infos must be a MemInfo or a list of them, but is a {type(mem_infos).__name__}"
        )
    for at, info in enumerate(given):
        name = f"mem_infos[{at}]"
        if not isinstance(info, MemInfo):
            raise param_error(f"{name} must be a MemInfo, but is a {type(info).__name__}")
        if info.mem_type is not Memtype.MEM_TYPE_DEVICE:
            raise param_error(f"{name}.mem_type={info.mem_type} must be MEM_TYPE_DEVICE")
        # None passes the constructor, as in the reference.
        if not info.addr or info.addr < 0:
            raise param_error(f"{name}.addr={shown(info.addr)} is no address")
        if not info.size or info.size < 0:
            raise param_error(f"{name}.size={shown(info.size)} must be positive")
    if not given:
        raise param_error("mem_infos is empty")


def check_linked(instance: Instance) -> None:
    """There must be somebody that the mapping could matter to.

    Raises:
        LLMNotLinkedError: There is no link.
    """
    if not any(link.state is LinkState.LINKED for link in instance.links.links()):
        raise error_for(
            LLMStatusCode.LLM_NOT_YET_LINK,
            "no peer is linked",
            op="remap_registered_memory",
        )
