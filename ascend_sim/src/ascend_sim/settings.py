# SPDX-License-Identifier: Apache-2.0
"""What to simulate, checked, and as the environment variables that the runtime reads."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

SCHEDULERS = ("lazy", "random", "inline")
# Names that torch_npu 2.13.0 knows: of A2 (training and inference share a chip) and of A3.
SOCS = (
    *(f"Ascend910B{suffix}" for suffix in ("1", "2", "2C", "3", "4", "4-1")),
    *(f"Ascend910_{number}" for number in ("9362", "9372", "9381", "9382", "9391", "9392")),
)
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_MAX_DEVICES = 16
_MIN_MEMORY = 32 * 2**20
_MAX_MEMORY = 128 * 2**30


@dataclass(frozen=True)
class Settings:
    """What the simulator is to be.

    Attributes:
        devices: How many devices, at most 16.
        memory: Bytes of each, as a number or such as "2GiB".
        scheduler: "lazy": nothing in a stream runs until somebody waits for it; "random": a seeded
            interleaving; "inline": everything at once, which hides missing synchronisations.
        seed: Of "random"; None takes a random one.
        soc: Which chip to be, one of `SOCS`.
        poison: Byte that fresh and freed memory is filled with; None leaves fresh memory zero.

    Raises:
        ValueError: A value that can't be simulated.
    """

    devices: int = 2
    memory: int | str = "2GiB"
    scheduler: str = "lazy"
    seed: int | None = None
    soc: str = "Ascend910B1"
    poison: int | None = 0xA5

    def __post_init__(self) -> None:
        if not 1 <= self.devices <= _MAX_DEVICES:
            raise ValueError(f"devices={self.devices} is out of range [1, {_MAX_DEVICES}]")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler={self.scheduler!r} is none of {', '.join(SCHEDULERS)}")
        if self.soc not in SOCS:
            raise ValueError(f"soc={self.soc!r} is none of {', '.join(SOCS)}")
        if self.poison is not None and not 0 <= self.poison <= 0xFF:
            raise ValueError(f"poison={self.poison} is no byte")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is out of range [0, 2**64)")
        if not _MIN_MEMORY <= self.memory_bytes <= _MAX_MEMORY:
            raise ValueError(f"memory={self.memory!r} is out of range [32MiB, 128GiB]")

    @property
    def memory_bytes(self) -> int:
        """Bytes of each device.

        Raises:
            ValueError: `memory` is neither a number nor one with KiB, MiB or GiB.
        """
        if isinstance(self.memory, int):
            return self.memory
        found = re.fullmatch(r"(\d+)\s*([kmg]?)(i?b)?", self.memory.strip().lower())
        if found is None:
            raise ValueError(f"memory={self.memory!r} is no size such as 2GiB or 512MiB")
        return int(found[1]) * _UNITS[found[2]]

    def as_environment(self) -> dict[str, str | None]:
        """The variables that hold these settings. Without a seed it takes one."""
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return {
            "ASCEND_SIM_DEVICES": str(self.devices),
            "ASCEND_SIM_MEMORY": str(self.memory_bytes),
            "ASCEND_SIM_SCHEDULER": self.scheduler,
            "ASCEND_SIM_SEED": str(seed),
            "ASCEND_SIM_SOC": self.soc,
            "ASCEND_SIM_POISON": "none" if self.poison is None else str(self.poison),
        }
