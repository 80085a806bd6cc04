# SPDX-License-Identifier: Apache-2.0
"""KvCache: the v1 value that programs may still pass around; no operation here takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.checks import check_addresses, check_isinstance, param_error
from llm_datadist_torch.values.enums import Placement

CPU_CACHE_ID = -1


class KvCache:
    """Addresses of the tensors of a v1 cache, per device (reference API, 7.3).

    Owns nothing and keeps nothing alive. The methods of ``CacheManager`` refuse it with TypeError:
    use ``Cache``.

    Args:
        cache_id: its id, -1 for one from `create_cpu_cache`.
        cache_desc: what its tensors are.
        per_device_tensor_addrs: for each device, the addresses of its tensors.
        kv_cache_manager: the v1 manager that made it, None for none.
    """

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        per_device_tensor_addrs: Sequence[list[int]],
        kv_cache_manager: Any = None,  # noqa: ANN401 (a class of the v1 package)
    ) -> None:
        self._cache_id = cache_id
        self._cache_desc = cache_desc
        self._per_device_tensor_addrs = list(per_device_tensor_addrs)
        self._kv_cache_manager = kv_cache_manager

    @property
    def cache_id(self) -> int:
        """Its id."""
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        """What its tensors are, the caller's own object."""
        return self._cache_desc

    @property
    def per_device_tensor_addrs(self) -> list[list[int]]:
        """For each device, the addresses of its tensors."""
        return self._per_device_tensor_addrs

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: list[int] | list[list[int]]) -> KvCache:
        """Notes addresses of host memory; they are not looked at.

        Args:
            cache_desc: its placement must be `Placement.HOST`.
            addrs: the addresses of one device, or a list of them for each device.

        Raises:
            AttributeError: `cache_desc` is None.
            TypeError: an argument of a wrong type (a bool is not an address).
            ValueError: an address outside uint64.
            LLMParamError: another placement, no address at all, or other than `num_tensors`
                addresses for a device.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        addrs = check_isinstance("addrs", addrs, list, (int, list), allow_none=False)
        nested = [entry for entry in addrs if isinstance(entry, list)]
        if nested and len(nested) < len(addrs):
            raise TypeError("addrs only support all int or all list, but got both")
        per_device = nested or [[entry for entry in addrs if isinstance(entry, int)]]
        per_device = [
            check_addresses(f"addrs[{device}]" if nested else "addrs", device_addrs)
            for device, device_addrs in enumerate(per_device)
        ]
        if cache_desc.placement != Placement.HOST:
            raise param_error(
                f"create_cpu_cache wants placement HOST, got {cache_desc.placement!s}"
            )
        for device, device_addrs in enumerate(per_device):
            if len(device_addrs) != cache_desc.num_tensors:
                raise param_error(
                    f"{len(device_addrs)} addresses for device {device}, but num_tensors is "
                    f"{cache_desc.num_tensors}"
                )
        return cls(CPU_CACHE_ID, cache_desc, per_device)

    def __repr__(self) -> str:
        return (
            f"KvCache(cache_id = {self._cache_id}, "
            f"num_devices = {len(self._per_device_tensor_addrs)})"
        )
