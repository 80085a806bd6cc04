# SPDX-License-Identifier: Apache-2.0
"""``kv_connector_extra_config``: what a user may set."""

from __future__ import annotations

import dataclasses
import secrets
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.vllm import addresses

PULL, PUSH = MODES = ("pull", "push")

# Peers' ids travel in JSON, where not every reader keeps more than 53 bits.
_ID_BITS = 52
_MAX_PORT = 65535


def random_id() -> int:
    """A cluster id that nobody else has, for one life of a worker."""
    return secrets.randbits(_ID_BITS) or 1


@dataclass(frozen=True)
class Settings:
    """The connector's settings, checked.

    Attributes:
        mode: "pull": the consumer reads from the producer when it wants to. "push": the producer
            writes to the consumer during its prefill.
        host: Where this engine's workers listen: an address, a name, "interface:eth0",
            "subnet:10.0.0.0/8" or "env:POD_IP". Each worker looks that up on its own host.
        advertise: At which host peers reach them, in the same forms; empty: ``host``.
        port: Port of the first worker, the next has the next; 0 for free ones.
        cluster_id: Name of the first worker among peers, the next has the next; 0 for random ones.
            With "push" the producer's requests name the consumer, so it wants a known id and port.
        lease_s: Seconds for which a producer keeps the blocks of a finished prompt for a consumer
            that has claimed them.
        claim_s: Seconds within which a consumer must claim them.
        timeout_s: Seconds that one transfer may take, linking included.
        heartbeat_s: Deprecated, ignored: the kernel tells when a peer is gone.
        threads: Transfers with one peer that run at a time.
        verify: Compare checksums of all blocks after a pull.
        weights_id: What names the model's weights, instead of a digest of its weight files.
    """

    mode: str = PULL
    host: str = "127.0.0.1"
    advertise: str = ""
    port: int = 0
    cluster_id: int = 0
    lease_s: float = 120.0
    claim_s: float = 10.0
    timeout_s: float = 10.0
    heartbeat_s: float = 5.0
    threads: int = field(default=4)
    verify: bool = False
    weights_id: str = ""

    @classmethod
    def of(cls, extra_config: Mapping[str, Any]) -> Settings:
        """The settings of a ``kv_connector_extra_config``.

        Raises:
            LLMParamError: An unknown key, or a value that does not fit it.
        """
        fields = {each.name: each for each in dataclasses.fields(cls)}
        for name, value in extra_config.items():
            if name not in fields:
                raise param_error(
                    f"kv_connector_extra_config: {name!r} is no setting of the connector",
                    remedy=f"known ones are {', '.join(fields)}.",
                )
            _check_type(name, value, fields[name].default)
        if "heartbeat_s" in extra_config:
            warnings.warn(
                "kv_connector_extra_config: heartbeat_s is ignored and will be removed",
                DeprecationWarning,
                stacklevel=2,
            )
        settings = cls(**extra_config)
        settings._check_values()
        return settings

    def _check_values(self) -> None:
        if self.mode not in MODES:
            raise param_error(f"mode={self.mode!r} must be one of {', '.join(MODES)}")
        for name, low, high in (
            ("port", 0, _MAX_PORT),
            ("cluster_id", 0, 2**_ID_BITS),
            ("lease_s", 1, 86400),
            ("claim_s", 0.1, 86400),
            ("timeout_s", 0.1, 3600),
            ("heartbeat_s", 0.1, 3600),
            ("threads", 1, 64),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise param_error(f"{name}={value} is out of range [{low}, {high}]")

    def at_rank(self, rank: int) -> Endpoint:
        """Where the worker of this rank listens, and what it is called.

        Args:
            rank: Of the worker among all of its engine, data-parallel ones included.

        Raises:
            LLMParamError: The host is not one of this machine, or the rank makes the port or the id
                too large.
        """
        port = self.port + rank if self.port else 0
        cluster_id = self.cluster_id + rank if self.cluster_id else random_id()
        for name, base, value, high in (
            ("port", self.port, port, _MAX_PORT),
            ("cluster_id", self.cluster_id, cluster_id, 2**_ID_BITS),
        ):
            if value > high:
                raise param_error(
                    f"{name}={base} makes {value} for the worker of rank {rank}, above {high}"
                )
        try:
            listen = addresses.local_address(self.host)
            advertised = addresses.advertised(self.advertise or self.host, listen)
        except ValueError as error:
            raise param_error(f"worker of rank {rank}: {error}") from None
        return Endpoint(cluster_id, listen, advertised, port)

    @property
    def timeout_ms(self) -> int:
        """``timeout_s`` in the unit of this library."""
        return int(self.timeout_s * 1000)


@dataclass(frozen=True)
class Endpoint:
    """One worker's id and addresses.

    Attributes:
        cluster_id: Its id.
        listen: Address that it listens on.
        advertised: Address or name at which peers reach it.
        port: Its port; 0 for any free one.
    """

    cluster_id: int
    listen: str
    advertised: str
    port: int


def _check_type(name: str, value: object, default: object) -> None:
    wanted = (int, float) if isinstance(default, float) else (type(default),)
    # A bool is an int, but no port.
    if not isinstance(value, wanted) or isinstance(value, bool) is not isinstance(default, bool):
        raise param_error(
            f"{name}={value!r} must be of type {type(default).__name__},"
            f" but is {type(value).__name__}",
            remedy=_how_to_write(name, value, wanted),
        )


def _how_to_write(name: str, value: object, wanted: tuple[type, ...]) -> str | None:
    """What to write for a number that was given as a text; None for anything else."""
    for kind in wanted if isinstance(value, str) else ():
        with suppress(ValueError):
            return f'write "{name}": {kind(value)}, without quotes.'
    return None
