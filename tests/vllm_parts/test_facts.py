# SPDX-License-Identifier: Apache-2.0
"""What is read from vLLM's configuration, with objects that only look like vLLM's."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_datadist_torch.vllm import facts, observing, weights
from llm_datadist_torch.vllm.fingerprint import kv_dtype
from llm_datadist_torch.vllm.layouts import GroupLayout, Kind
from llm_datadist_torch.vllm.observing import Record
from llm_datadist_torch.vllm.settings import Settings

# -- weights ---------------------------------------------------------------------------------------


def write(path: Path, tensors: dict[str, bytes]) -> None:
    """A ``.safetensors`` file."""
    header, at = {}, 0
    for name, data in tensors.items():
        span = [at, at + len(data)]
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": span}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


def model_at(directory: Path, seed: int = 0, **other: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    numbers = {f"layer.{at}": bytes([at + seed]) * 10_000 for at in range(20)}
    write(directory / "model.safetensors", numbers | other)
    return directory


def test_the_same_weights_under_other_paths(tmp_path: Path) -> None:
    first = weights.digest_of_files(model_at(tmp_path / "a" / "name"))
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    # As the cache of a hub has it: links to files under other names.
    blob = tmp_path / "blob"
    (tmp_path / "a" / "name" / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "config.json").write_text("{}")
    assert first == weights.digest_of_files(snapshot)


@pytest.mark.parametrize("changed", ["layer.0", "layer.11", "layer.19"])
def test_fine_tunes_with_equal_headers(tmp_path: Path, changed: str) -> None:
    a = model_at(tmp_path / "a" / "model")
    b = model_at(tmp_path / "b" / "model", **{changed: b"\xff" * 10_000})
    assert (a / "model.safetensors").stat().st_size == (b / "model.safetensors").stat().st_size
    assert weights.digest_of_files(a) != weights.digest_of_files(b)


def test_very_many_tensors_are_sampled_in_all_kinds_of_layers(tmp_path: Path) -> None:
    names = [f"{layer}.{kind}" for layer in range(400) for kind in range(9)]
    tensors = dict.fromkeys(names, b"\x01" * 128)
    write(tmp_path / "a.safetensors", tensors)
    tuned = {name: b"\2" * 128 if name.endswith(".4") else data for name, data in tensors.items()}
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "a.safetensors", tuned)
    assert weights.digest_of_files(tmp_path / "a.safetensors") != weights.digest_of_files(
        tmp_path / "b" / "a.safetensors"
    )


def test_other_files_are_no_weights(tmp_path: Path) -> None:
    assert weights.digest_of_files(tmp_path) is None
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert weights.digest_of_files(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)
    found = weights.digest_of_files(tmp_path)
    assert found
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    assert weights.digest_of_files(tmp_path) == found
    (tmp_path / "model.safetensors").write_bytes(b"short")
    assert weights.digest_of_files(tmp_path) != found
    assert weights.locate("no/such-model", None) is None


def configured(model: Path, **changed: Any) -> SimpleNamespace:
    """A configuration of vLLM's kind."""
    found = {
        "model": str(model),
        "revision": None,
        "dtype": "torch.float16",
        "quantization": None,
        "load_format": "auto",
        "cache_dtype": "auto",
        "calculate_kv_scales": False,
        "additional_config": {},
        "hf": {"_name_or_path": str(model), "hidden_size": 8},
    } | changed
    hf = found["hf"]
    return SimpleNamespace(
        model_config=SimpleNamespace(
            **{name: found[name] for name in ("model", "revision", "dtype", "quantization")},
            hf_config=SimpleNamespace(to_dict=lambda: hf),
        ),
        load_config=SimpleNamespace(load_format=found["load_format"]),
        cache_config=SimpleNamespace(
            cache_dtype=found["cache_dtype"], calculate_kv_scales=found["calculate_kv_scales"]
        ),
        additional_config=found["additional_config"],
    )


def fingerprint(config: Any, **settings: Any) -> Any:
    return facts.fingerprint_of(
        config, Settings.of(settings), version="1", platform="cpu", kernel="cpu/vec"
    )


def test_fingerprints_by_meaning(tmp_path: Path) -> None:
    mine = fingerprint(configured(model_at(tmp_path / "a")))
    same = fingerprint(configured(model_at(tmp_path / "b"), cache_dtype="float16"))
    assert not mine.differences(same)
    for changed, name in (
        ({"cache_dtype": "fp8"}, "kv_dtype"),
        ({"quantization": "awq"}, "config"),
        ({"hf": {"hidden_size": 9}}, "config"),
        ({"additional_config": {"enable_kv_nz": True}}, "kernel"),
    ):
        other = fingerprint(configured(tmp_path / "a", **changed))
        assert [each.split()[0] for each in mine.differences(other)] == [name]
    other = fingerprint(configured(model_at(tmp_path / "c", seed=1)))
    assert [each.split()[0] for each in mine.differences(other)] == ["weights"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("auto", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("fp8", "float8_e4m3fn"),
        ("fp8_e4m3", "float8_e4m3fn"),
        ("fp8_e5m2", "float8_e5m2"),
    ],
)
def test_dtypes(text: str, meant: str) -> None:
    assert kv_dtype(text, "torch.bfloat16") == meant


def test_weights_that_can_not_be_looked_at(tmp_path: Path) -> None:
    for config, reason in (
        (configured(tmp_path / "none"), "no weight files"),
        (configured(model_at(tmp_path / "a"), load_format="dummy"), "makes weights up"),
    ):
        with pytest.raises(ValueError, match=f"{reason}.*weights_id"):
            fingerprint(config)
        assert fingerprint(config, weights_id="mine").weights == "id mine"


def test_scales_that_each_engine_makes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calculate_kv_scales"):
        fingerprint(configured(model_at(tmp_path / "a"), calculate_kv_scales=True))


def test_adapters_by_name_and_content(tmp_path: Path) -> None:
    def adapter(name: str, directory: Path) -> str:
        request = SimpleNamespace(lora_name=name, lora_path=str(directory))
        return facts.Adapters().name(request)

    a, b = model_at(tmp_path / "a"), model_at(tmp_path / "b")
    assert adapter("x", a) == adapter("x", b)
    assert adapter("x", a) != adapter("y", a)
    (b / "adapter_config.json").write_text('{"r": 8}')
    assert adapter("x", a) != adapter("x", b)
    adapters = facts.Adapters()
    request = SimpleNamespace(lora_name="x", lora_path=str(a))
    before = adapters.name(request)
    model_at(a, seed=3)
    os.utime(a / "model.safetensors", (1, 1))
    changed = adapters.name(request)
    assert changed != before
    # Its scale is there, and not among its weights.
    (a / "adapter_config.json").write_text('{"lora_alpha": 16}')
    os.utime(a / "adapter_config.json", (2, 2))
    assert adapters.name(request) != changed


# -- settings and axes -----------------------------------------------------------------------------


def transfer(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"kv_connector_extra_config": {}} | given))


def test_vllms_own_address() -> None:
    assert facts.settings_of(transfer(kv_ip="127.0.0.1", kv_port=14579)) == Settings()
    found = facts.settings_of(transfer(kv_ip="10.0.0.1", kv_port=7000))
    assert (found.host, found.port) == ("10.0.0.1", 7000)
    with pytest.raises(ValueError, match=r"kv_ip='10.0.0.1' and .*host='10.0.0.2' differ"):
        facts.settings_of(
            transfer(kv_ip="10.0.0.1", kv_connector_extra_config={"host": "10.0.0.2"})
        )


@dataclasses.dataclass
class Parallel:
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    some_day_parallel_size: int = 1
    enable_expert_parallel: bool = True


def test_axes() -> None:
    facts.check_axes(Parallel(2, 2, 2))
    for name in ("decode_context_parallel_size", "some_day_parallel_size"):
        with pytest.raises(ValueError, match=f"{name}=2 is not served"):
            facts.check_axes(Parallel(**{name: 2}))


@pytest.mark.parametrize(("replica", "dense"), [(0, False), (1, False), (1, True)])
def test_ranks_of_workers(replica: int, dense: bool) -> None:
    """vLLM runs the data-parallel ranks of a dense model as engines of their own."""
    config = SimpleNamespace(
        data_parallel_index=replica,
        data_parallel_rank=0 if dense else replica,
        tensor_parallel_size=2,
        world_size=4,
    )
    found = [facts.worker_rank(config, stage, rank) for stage in (0, 1) for rank in (0, 1)]
    assert found == [replica * 4 + at for at in range(4)]


def test_sleep_that_the_connector_is_not_told_of() -> None:
    asleep = SimpleNamespace(enable_sleep_mode=True)
    facts.check_sleep(asleep, told=True)
    facts.check_sleep(SimpleNamespace(), told=False)
    with pytest.raises(ValueError, match="enable_sleep_mode is not served"):
        facts.check_sleep(asleep, told=False)


# -- KV cache groups -------------------------------------------------------------------------------


def spec(kind: str, *bases: type, **fields: Any) -> Any:
    """An object whose class has the name of one of vLLM's."""
    made = type(kind, bases or (object,), {})()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


FULL = type("FullAttentionSpec", (), {})
SLIDING = type("SlidingWindowSpec", (), {})


def grouped(*specs: Any) -> SimpleNamespace:
    return SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(layer_names=[f"layer.{at}"], kv_cache_spec=each)
            for at, each in enumerate(specs)
        ]
    )


def test_groups() -> None:
    config = grouped(
        spec("FullAttentionSpec", block_size=128, num_kv_heads=2),
        spec("SlidingWindowSpec", block_size=64, num_kv_heads=4, sliding_window=512),
        spec("MLAAttentionSpec", FULL, block_size=128, num_kv_heads=1),
        spec("MambaSpec", block_size=4096, mamba_cache_mode="none", num_speculative_blocks=2),
        spec("ChunkedLocalAttentionSpec", block_size=16, num_kv_heads=2, attention_chunk_size=32),
        spec("AscendFullAttentionSpec", FULL, block_size=128, num_kv_heads=2),
    )
    found = facts.group_specs(config, range(6), model_heads=4, tp_size=2)
    assert [(group.layout, *group.heads.values()) for group in found] == [
        (GroupLayout(Kind.ATTENTION, 128), 4),
        (GroupLayout(Kind.WINDOW, 64, 512), 8),
        (GroupLayout(Kind.ATTENTION, 128), 1),
        (GroupLayout(Kind.STATE, 0, 0, 2), 1),
        (GroupLayout(Kind.WINDOW, 16, 32), 4),
        (GroupLayout(Kind.ATTENTION, 128), 4),
    ]


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (spec("CrossAttentionSpec", block_size=16, num_kv_heads=1), "CrossAttentionSpec"),
        (spec("NextYearsSpec", block_size=16), "NextYearsSpec"),
        (spec("RSWASpec", FULL, block_size=16, num_kv_heads=1), "RSWASpec"),
        (
            spec("MLAAttentionSpec", FULL, block_size=16, num_kv_heads=1, tokens_per_state=4),
            "tokens per state: 4",
        ),
        (spec("MambaSpec", block_size=16, mamba_cache_mode="all"), "mamba_cache_mode='all'"),
    ],
)
def test_kinds_that_are_refused_by_name(refused: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        facts.group_specs(grouped(refused), [0], 2, 1)


# -- counts ----------------------------------------------------------------------------------------


def test_counts() -> None:
    record = Record()
    assert observing.is_empty(record.take())
    record.loaded(0.5, 1 << 20)
    record.failed(ValueError("x"))
    record.count(observing.EXPIRED, 2)
    both = observing.merged(record.take(), observing.empty())
    assert observing.is_empty(record.take())
    shown = observing.reduced(observing.merged(both, both))
    assert shown["loads"] == 2
    assert shown["mean load (ms)"] == 500.0
    assert shown["MB per load"] == 1.0
    assert (shown["failed loads"], shown["expired leases"]) == (2, 4)
