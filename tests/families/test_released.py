"""Models released in MXFP4 and FP8: packed on the way from their codes, they are the models of the plain numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import checkpoint_model, dequantized_model
from released import as_fp8, as_mxfp4, release
from routes import assert_follows
from safetensors.torch import load_file, save_file
from test_engine import NONE, hqq, random_ids

import moeflow
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.discovery import discover
from moeflow.errors import CheckpointError

# 192 is a block and a half of 128: blocks at the edges are smaller, as in DeepSeek-V3's kv_a_proj_with_mqa.
WIDE = {"hidden_size": 192, "moe_intermediate_size": 192}
E8M0 = torch.float8_e8m0fnu
FORMATS: dict[str, tuple[str, dict[str, object], Any, dict[str, object]]] = {
    "mxfp4": ("gpt_oss", {}, as_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}),
    "fp8 in blocks": (
        "deepseek_v3", WIDE, as_fp8((128, 128)),
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "fp8 with one scale": (
        "deepseek_v3", {}, as_fp8(None), {"quant_method": "fp8", "weight_block_size": None},
    ),
    "fp8 with powers of two, under another name": (
        "deepseek_v3", {}, as_fp8((32, 32), E8M0, ".scale"), {"quant_method": "fp8", "weight_block_size": [32, 32]},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FORMATS)
def both(
    request: pytest.FixtureRequest, checkpoint_factory: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The released checkpoint, and the plain one of the same numbers."""
    family, changes, quantizer, settings = FORMATS[request.param]
    source = checkpoint_factory(family, layers=3, **changes)
    return release(source, tmp_path_factory.mktemp("released"), quantizer, settings)


def test_it_reads_as_the_plain_checkpoint(both: tuple[Path, Path]) -> None:
    released, plain = (Checkpoint.open(directory) for directory in both)
    assert len(released.headers) > len(plain.headers)
    assert {n: (i.dtype, i.shape, i.nbytes) for n, i in released.tensors.items()} == {
        n: (i.dtype, i.shape, i.nbytes) for n, i in plain.tensors.items()
    }
    assert (released.family, released.layers, released.dtype) == (plain.family, plain.layers, "bfloat16")
    assert released.resident == plain.resident
    assert released.parameters() == plain.parameters()
    assert released.digest() != plain.digest()
    for name, tensor in load_file(plain.directory / "model.safetensors").items():
        assert torch.equal(released.read(name), tensor), name
    for layer in plain.layers:
        for part in layer.experts[5].values():
            assert torch.equal(released.read_slice(part), plain.read_slice(part))


def test_the_declaration_is_found_without_a_declaration(both: tuple[Path, Path]) -> None:
    released, plain = (Checkpoint.open(directory) for directory in both)
    assert discover(released.directory, released.tensors) == plain.family


def test_transformers_reads_the_same_weights_from_it(both: tuple[Path, Path], request: pytest.FixtureRequest) -> None:
    """Its own dequantization, which wants whole blocks."""
    if "fp8 in blocks" in request.node.name:
        pytest.skip("transformers refuses blocks that are cut at the edges")
    found, wanted = (checkpoint_model(directory, torch.bfloat16).state_dict() for directory in both)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("quantization", [NONE, hqq(3)], ids=["none", "hqq"])
def test_its_artifact_is_that_of_the_plain_checkpoint(
    both: tuple[Path, Path], packed: Callable[..., Path], quantization: dict[str, object]
) -> None:
    released, plain = (packed(directory, quantization) for directory in both)
    shards = sorted(p.name for p in plain.glob("*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        assert (released / name).read_bytes() == (plain / name).read_bytes()


def test_a_scale_that_is_no_number_is_refused_by_name(
    both: tuple[Path, Path], tmp_path: Path, packed: Callable[..., Path]
) -> None:
    damaged = Path(shutil.copytree(both[0], tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    name = next(n for n in sorted(tensors) if ".layers.2." in n and ".experts." in n and "scale" in n)
    tensors[name].view(-1).view(torch.uint8)[-4:] = 255
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity in \d of \d+ numbers"):
        packed(damaged, NONE)


@pytest.mark.parametrize(("k", "prefetch"), [(3, 1), (1, 0)])
def test_unquantized_equals_transformers_on_dequantized_weights(
    both: tuple[Path, Path], packed: Callable[..., Path], reference: Callable[[Path], Any], k: int, prefetch: int
) -> None:
    released, plain = both
    with moeflow.load(packed(released, NONE), experts_per_layer=k, prefetch_depth=prefetch) as engine:
        assert_follows(engine, reference(plain), random_ids(40), chunks=(512, 1, 7))


def test_quantized_again_equals_dequantized_weights(both: tuple[Path, Path], packed: Callable[..., Path]) -> None:
    artifact = packed(both[0], hqq(3))
    with moeflow.load(artifact, experts_per_layer=3, cpu_experts="off") as engine:
        assert_follows(engine, dequantized_model(artifact), random_ids(30), chunks=(512, 1))
