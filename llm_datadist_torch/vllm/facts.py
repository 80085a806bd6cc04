# SPDX-License-Identifier: Apache-2.0
"""What the connector reads from vLLM's configuration; vLLM's objects come in, none is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.vllm import weights
from llm_datadist_torch.vllm.fingerprint import Fingerprint, digest_of, kv_dtype
from llm_datadist_torch.vllm.foreign import VllmObject
from llm_datadist_torch.vllm.layouts import GroupLayout, GroupSpec, Kind
from llm_datadist_torch.vllm.settings import Settings

_SERVED_AXES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "data_parallel_size_local",
)
"""Parallel sizes that may be above 1. Experts are shared without a size of their own."""

# Defaults of vLLM's KVTransferConfig, which can't be told from what a user typed.
_DEFAULT_KV_IP, _DEFAULT_KV_PORT = "127.0.0.1", 14579


def check_axes(parallel_config: VllmObject) -> None:
    """Refuse what shares the KV in a way that is not known.

    Raises:
        LLMParamError: An axis that is not served, by its name.
    """
    for field in dataclasses.fields(parallel_config):
        name = field.name
        size = getattr(parallel_config, name, 1)
        is_axis = name.endswith("_parallel_size") and isinstance(size, int)
        if is_axis and size > 1 and name not in _SERVED_AXES:
            raise param_error(
                f"{name}={size} is not served",
                remedy=f"set it to 1. What may be larger: {', '.join(_SERVED_AXES)}.",
            )


def worker_rank(parallel_config: VllmObject, stage: int, rank: int) -> int:
    """The rank of a worker among all of its engine, data-parallel ones included.

    Args:
        parallel_config: vLLM's.
        stage: Of the worker, its pipeline rank.
        rank: Of the worker within its stage, its tensor-parallel rank.
    """
    # Where the ranks of a dense model are engines of their own, vLLM sets data_parallel_rank to 0.
    replica = parallel_config.data_parallel_index
    in_engine = stage * parallel_config.tensor_parallel_size + rank
    return int(replica * parallel_config.world_size + in_engine)


def check_sleep(model_config: VllmObject, *, told: bool) -> None:
    """Refuse a sleep mode that the connector would not hear of.

    Args:
        model_config: vLLM's.
        told: Whether this vLLM tells connectors that the KV's memory goes away.

    Raises:
        LLMParamError: It does not, and the mode is on: peers would read memory that is not there.
    """
    if not told and getattr(model_config, "enable_sleep_mode", False):
        raise param_error(
            "enable_sleep_mode is not served: this vLLM does not tell KV connectors when the KV's"
            " memory goes away",
            remedy="leave enable_sleep_mode out, or use vLLM 0.33 or later.",
        )


def settings_of(transfer_config: VllmObject) -> Settings:
    """The settings, with vLLM's own ``kv_ip`` and ``kv_port`` where they are given.

    Raises:
        LLMParamError: Both are given, and differ; or as for :meth:`Settings.of`.
    """
    given = dict(transfer_config.kv_connector_extra_config)
    for name, ours, default in (
        ("kv_ip", "host", _DEFAULT_KV_IP),
        ("kv_port", "port", _DEFAULT_KV_PORT),
    ):
        value = getattr(transfer_config, name, default)
        if value in (default, None):
            continue
        if given.setdefault(ours, value) != value:
            raise param_error(
                f"{name}={value!r} and kv_connector_extra_config's {ours}={given[ours]!r} differ",
                remedy=f"leave {name} out.",
            )
    return Settings.of(given)


def weights_of(model_config: VllmObject, load_config: VllmObject, settings: Settings) -> str:
    """What names the weights.

    Raises:
        LLMParamError: There are none to look at, and no ``weights_id``.
    """
    if settings.weights_id:
        return f"id {settings.weights_id}"
    reason = f"load_format={load_config.load_format!r} makes weights up"
    if load_config.load_format != "dummy":
        where = weights.locate(model_config.model, model_config.revision)
        digest = weights.digest_of_files(where) if where else None
        if digest:
            return f"files {digest}"
        reason = f"no weight files of {model_config.model!r} are on this host"
    raise param_error(
        f"{reason}, so peers can't see whether they have the same weights",
        remedy='set kv_connector_extra_config\'s "weights_id" to a name that only engines with'
        " these weights have.",
    )


def fingerprint_of(
    config: VllmObject, settings: Settings, *, version: str, platform: str, kernel: str
) -> Fingerprint:
    """What peers must have in common with an engine of this configuration.

    Raises:
        LLMParamError: As for :func:`weights_of`; or scales that each engine makes for itself.
    """
    model, cache = config.model_config, config.cache_config
    if getattr(cache, "calculate_kv_scales", False):
        raise param_error(
            "calculate_kv_scales: each engine would have scales of its own for the same KV",
            remedy="leave it out; scales of the checkpoint, or 1.0, are the same everywhere.",
        )
    facts = {
        name: value
        for name, value in model.hf_config.to_dict().items()
        # These say where it came from and what wrote it.
        if name not in ("_name_or_path", "_commit_hash", "transformers_version")
    }
    additional = getattr(config, "additional_config", None)
    # The same shapes, in another order of bytes.
    fractal = isinstance(additional, Mapping) and bool(additional.get("enable_kv_nz"))
    return Fingerprint(
        vllm=version,
        platform=platform,
        weights=weights_of(model, config.load_config, settings),
        config=digest_of(repr(sorted(facts.items())), repr(model.quantization)),
        dtype=str(model.dtype),
        kv_dtype=kv_dtype(str(cache.cache_dtype), str(model.dtype)),
        kernel=f"{kernel}/nz" if fractal else kernel,
    )


def platform_name(platform: VllmObject, device: str) -> str:
    """The platform's plugin with its version, and the chip."""
    package = type(platform).__module__.partition(".")[0]
    if package == "vllm":
        return device
    try:
        return f"{package} {metadata.version(package.replace('_', '-'))} {device}"
    except metadata.PackageNotFoundError:
        return f"{package} {device}"


class Adapters:
    """What names an adapter (LoRA): its name, and a digest of its files.

    Thread safety: none; used by the engine's loop.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[str, float], str] = {}

    def name(self, lora_request: VllmObject) -> str:
        """Of a request's adapter; its files are read once, and again when they are changed."""
        given = str(lora_request.lora_path)
        where = weights.locate(given, None)
        files = weights.weight_files(where) if where else []
        config_file = where / "adapter_config.json" if where else None
        looked_at = [*files, *([config_file] if config_file and config_file.is_file() else [])]
        changed = max((path.stat().st_mtime for path in looked_at), default=0.0)
        key = given, changed
        if key not in self._digests:
            config = _text_of(config_file) if config_file and files else ""
            content = weights.digest_of_files(where) if where else None
            self._digests[key] = digest_of(content or given, config)
        return f"{lora_request.lora_name}\0{self._digests[key]}"


def _text_of(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


# -- KV cache groups ------------------------------------------------------------------------------


def group_specs(
    kv_cache_config: VllmObject, group_ids: Sequence[int], model_heads: int, tp_size: int
) -> list[GroupSpec]:
    """What the layouts need to know of the KV cache groups.

    Args:
        kv_cache_config: vLLM's.
        group_ids: Those that are handed over.
        model_heads: KV heads of the model.
        tp_size: Workers that share them.

    Raises:
        LLMParamError: A kind of KV that is not known, by its name.
    """
    found = []
    for group_id in group_ids:
        group = kv_cache_config.kv_cache_groups[group_id]
        specs = dict(_layer_specs(group))
        layouts = {_group_layout(spec) for spec in specs.values()}
        if len(layouts) != 1:
            raise param_error(f"KV cache group {group_id} has layers of several kinds: {layouts}")
        heads = {name: _total_heads(spec, model_heads, tp_size) for name, spec in specs.items()}
        found.append(GroupSpec(layouts.pop(), tuple(group.layer_names), heads))
    return found


def _layer_specs(group: VllmObject) -> Iterator[tuple[str, VllmObject]]:
    spec = group.kv_cache_spec
    several = getattr(spec, "kv_cache_specs", None)
    for name in group.layer_names:
        yield name, several[name] if several else spec


def _group_layout(spec: VllmObject) -> GroupLayout:
    # By the names of their classes, their own and their bases': some platforms have classes of
    # their own that are theirs.
    names = {each.__name__ for each in type(spec).__mro__}
    unknown = names & {
        "CrossAttentionSpec",
        "EncoderOnlyAttentionSpec",
        "SinkFullAttentionSpec",
        "RSWASpec",
        "CircularBufferSpec",
        "HiddenStateCacheSpec",
    }
    ratio = getattr(spec, "tokens_per_state", 1)
    if "MambaSpec" in names:
        mode = getattr(spec, "mamba_cache_mode", "none")
        if mode == "all":
            raise param_error(
                "mamba_cache_mode='all' is not served: it has states of many tokens",
                remedy="set it to 'none' or 'align'.",
            )
        return GroupLayout(Kind.STATE, 0, spare_blocks=getattr(spec, "num_speculative_blocks", 0))
    if not unknown and ratio == 1:
        if "SlidingWindowSpec" in names:
            extra = getattr(spec, "extra_retained_tokens", 0)
            return GroupLayout(Kind.WINDOW, spec.block_size, spec.sliding_window + extra)
        if "ChunkedLocalAttentionSpec" in names:
            return GroupLayout(Kind.WINDOW, spec.block_size, spec.attention_chunk_size)
        if "FullAttentionSpec" in names:
            return GroupLayout(Kind.ATTENTION, spec.block_size)
    raise param_error(
        f"KV of kind {type(spec).__name__} (tokens per state: {ratio}) can't be handed over"
    )


def _total_heads(spec: VllmObject, model_heads: int, tp_size: int) -> int:
    names = {each.__name__ for each in type(spec).__mro__}
    heads = getattr(spec, "num_kv_heads", None)
    if heads is None or "MLAAttentionSpec" in names or "SlidingWindowMLASpec" in names:
        return 1
    if heads == max(1, model_heads // tp_size):
        return model_heads
    return int(heads) * tp_size
