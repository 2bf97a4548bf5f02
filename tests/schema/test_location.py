"""The exact lines that a person gets for a fault: where, what stands there, what may stand there."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest

from moeflow.errors import DocumentError
from moeflow.schema import HardwareProfile, Plan, Profile

KEYS = (
    "format_version, model, revision, hardware, quantization, cache, prefetch, memory, context_length, dtype, "
    "execution, cpu, strategy"
)
MACHINE: dict[str, Any] = {
    "name": "box", "origin": "measured", "cpu": {"cores": 8}, "ram": "32GiB", "link": {"host_to_device": "12GB/s"},
}  # fmt: skip


def _faults(document: type[Profile | HardwareProfile | Plan], data: Any) -> list[str]:
    with pytest.raises(DocumentError) as caught:
        document.parse(data, "laptop.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"quantization": {"experts": {"backend": "hqq", "bits": 5}}},
         "quantization.experts.bits is 5; hqq supports 2, 3, 4, 8"),
        ({"quantization": {"attention": {"backend": "hqq", "group_size": 48}}},
         "quantization.attention.group_size is 48; hqq supports 16, 32, 64, 128, 256"),
        ({"quantization": {"experts": {"backend": "gptq"}}},
         "quantization.experts.backend is 'gptq'; known: hqq, bitsandbytes, none, auto"),
        ({"quantization": {"experts": {"bits": 2}}},
         "quantization.experts.backend is missing; it selects the kind"),
        ({"quantization": {"experts": {"backend": "hqq", "bitz": 2}}},
         "quantization.experts.bitz: unknown key; did you mean bits? known: backend, bits, group_size, metadata_bits"),
        ({"quantization": {"experts": {"backend": "hqq", "metadata_bits": 4}}},
         "quantization.experts.metadata_bits is 4; hqq supports 8, 16"),
        ({"quantization": {"experts": {"backend": "bitsandbytes", "format": "fp4"}}},
         "quantization.experts.format is fp4; bitsandbytes supports nf4, int8"),
        ({"quantization": {"attention": {"backend": "bitsandbytes"}}},
         "quantization.attention.format is missing; it is required"),
        ({"quantization": {"attention": {"backend": "bitsandbytes", "format": "nf4", "group_size": 128}}},
         "quantization.attention.group_size: unknown key; known: backend, format"),
        ({"quantization": {"experts": {"backend": "none", "bits": 2}}},
         "quantization.experts.bits: unknown key; known: backend"),
        ({"quantization": {"expert": {"backend": "none"}}},
         "quantization.expert: unknown key; did you mean experts? known: experts, attention, shared_experts, head, "
         "overrides"),
        ({"memory": {"vrm": "1GiB"}},
         "memory.vrm: unknown key; did you mean vram? known: vram, ram, disk"),
        ({"context": 5}, f"context: unknown key; did you mean context_length? known: {KEYS}"),
        ({"zzz": 5}, f"zzz: unknown key; known: {KEYS}"),
        ({"cache": {"policy": "fifo"}}, "cache.policy is fifo; it supports lru, lfu, mix, static, learned"),
        ({"cache": {"experts_per_layer": -1}},
         "cache.experts_per_layer is -1; expected a whole number, 0 or more, or auto"),
        ({"memory": {"vram": "lots"}}, "memory.vram is lots; expected a size such as 11GiB or 512 MiB, or auto"),
        ({"context_length": 0}, "context_length is 0; input should be greater than or equal to 1"),
        ({"dtype": "int8"}, "dtype is int8; it supports float32, bfloat16, float16, auto"),
        ({"model": 5}, "model is 5; input should be a valid string"),
        ({"model": ""}, "model is ''; string should have at least 1 character"),
    ],
)  # fmt: skip
def test_a_fault_of_a_profile_is_one_exact_line(fault: dict[str, Any], line: str) -> None:
    assert _faults(Profile, {"model": "x", **fault}) == [f"laptop.yaml: {line}"]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"gpu": {"name": "T4", "memory": "16GiB", "compute_capability": "seven"}},
         r"gpu.compute_capability is seven; string should match pattern '^\d+\.\d+$'"),
        ({"gpu": {"name": "T4", "memory": "16GiB", "compute_capability": "7.5", "bandwidth": 1}},
         "gpu.bandwidth: unknown key; did you mean memory_bandwidth? "
         "known: name, memory, compute_capability, memory_bandwidth, kernels"),
        ({"link": {"host_to_device": "12GB"}},
         "link.host_to_device is 12GB; expected a rate such as 12.5GB/s"),
        ({"link": {"host_to_device": [12]}},
         "link.host_to_device is [12]; expected a rate such as 12.5GB/s"),
        ({"link": {}}, "link.host_to_device is missing; it is required"),
        ({"origin": "guess"}, "origin is guess; it supports measured, datasheet, derived"),
    ],
)  # fmt: skip
def test_a_fault_of_a_machine_is_one_exact_line(fault: dict[str, Any], line: str) -> None:
    assert _faults(HardwareProfile, {**MACHINE, **fault}) == [f"laptop.yaml: {line}"]


def test_all_faults_of_a_document_are_told_at_once() -> None:
    data = {
        "strategy": "fast",
        "memory": {"vram": -1},
        "quantization": {"experts": {"backend": "hqq", "bits": 5, "group_size": 7}, "attention": {"backend": "x"}},
    }
    assert sorted(_faults(Profile, data)) == [
        "laptop.yaml: memory.vram is -1; expected a size such as 11GiB or 512 MiB, or auto",
        "laptop.yaml: model is missing; it is required",
        "laptop.yaml: quantization.attention.backend is 'x'; known: hqq, bitsandbytes, none",
        "laptop.yaml: quantization.experts.bits is 5; hqq supports 2, 3, 4, 8",
        "laptop.yaml: quantization.experts.group_size is 7; hqq supports 16, 32, 64, 128, 256",
        "laptop.yaml: strategy is fast; it supports full, no-prefetch, no-cache, naive",
    ]


@pytest.mark.parametrize("data", [None, [], "text", 5])
def test_a_document_that_is_no_mapping_is_told_so(data: object) -> None:
    assert _faults(Profile, data) == [f"laptop.yaml: a profile is a mapping of keys, this is {type(data).__name__}"]


def test_the_file_that_was_loaded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "laptop.yaml"
    path.write_text("model: x\nquantization:\n  experts: {backend: hqq, bits: 5}\n")
    with pytest.raises(DocumentError) as caught:
        Profile.load(path)
    assert str(caught.value) == f"{path}: quantization.experts.bits is 5; hqq supports 2, 3, 4, 8"


def test_a_long_value_is_cut_so_that_the_rule_stays_in_sight() -> None:
    (line,) = _faults(Profile, {"model": "x", "strategy": "s" * 500})
    assert len(line) < 160
    assert line.endswith("...; it supports full, no-prefetch, no-cache, naive")


def _noise(draw: random.Random, depth: int = 0) -> Any:
    words = ["hqq", "none", "auto", "1GiB", "backend", "experts", "bits", "lru", "", "model", "cache", "quantization"]
    kinds = ["none", "int", "float", "word", "bool", "list", "dict"][: 5 if depth > 2 else 7]
    match draw.choice(kinds):
        case "none":
            return None
        case "int":
            return draw.randrange(-3, 300)
        case "float":
            return draw.choice((0.5, float("inf"), float("nan"), -1.0))
        case "word":
            return draw.choice([*words, "".join(draw.choices(string.printable, k=5))])
        case "bool":
            return draw.random() < 0.5
        case "list":
            return [_noise(draw, depth + 1) for _ in range(draw.randrange(3))]
    keys = [*words, *Profile.model_fields, 1, None]
    return {draw.choice(keys): _noise(draw, depth + 1) for _ in range(draw.randrange(5))}


@pytest.mark.parametrize("document", [Profile, HardwareProfile, Plan])
def test_no_document_whatever_it_holds_gives_another_error(document: type[Profile]) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(700):
        data = {key: _noise(draw) for key in draw.sample(list(document.model_fields), 4)}
        try:
            document.parse(data, "noise.yaml")
        except DocumentError as error:
            assert all(line.startswith("noise.yaml: ") for line in str(error).splitlines())
