"""Packing what is damaged: a message with place and numbers, and whatever the output held is as it was.

The faults themselves are tried one by one in the tests of the parts; here each goes the user's way, through `pack`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_mixtral

import moeflow
from moeflow.errors import CheckpointError, DocumentError, MoeflowError

NONE = {"experts": {"backend": "none"}, "attention": {"backend": "none"}}
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def _content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def pack(demo_artifact: Path) -> Callable[..., Path]:
    def run(checkpoint: Path, output: Path, quantization: object = NONE, **settings: bool) -> Path:
        hardware = str(demo_artifact / "hardware.yaml")
        profile = {"model": str(checkpoint), "quantization": quantization, "hardware": hardware}
        return moeflow.pack(profile, output, **settings)

    return run


@pytest.fixture(scope="module")
def good(tiny_checkpoint: Path, pack: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the undamaged checkpoint makes."""
    return pack(tiny_checkpoint, tmp_path_factory.mktemp("good") / "artifact")


def _refused(
    pack: Callable[..., Path], checkpoint: Path, tmp_path: Path, good: Path, quantization: object = NONE
) -> str:
    """The message; neither a new output nor a good artifact that should be replaced has been touched."""
    with pytest.raises(MoeflowError) as caught:
        pack(checkpoint, tmp_path / "new", quantization)
    assert not (tmp_path / "new").exists()
    present = Path(shutil.copytree(good, tmp_path / "present"))
    with pytest.raises(type(caught.value)):
        pack(checkpoint, present, quantization, overwrite=True)
    assert _content(present) == _content(good)
    assert isinstance(caught.value, CheckpointError | DocumentError)
    return str(caught.value)


def _rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def _rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def _edit_header(file: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Change the header and keep the data."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


# -- files -------------------------------------------------------------------------------------------------


def test_a_truncated_file(own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path]) -> None:
    file = own_checkpoint / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    message = _refused(pack, own_checkpoint, tmp_path, good)
    assert message == f"{file}: truncated: its tensors need {size} bytes, the file has {size - 1000}"


def test_a_header_larger_than_the_file(
    own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path]
) -> None:
    file = own_checkpoint / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes((1 << 40).to_bytes(8, "little") + raw[8:])
    message = _refused(pack, own_checkpoint, tmp_path, good)
    assert message.startswith(f"{file}: truncated or not safetensors")
    assert f"its header needs {(1 << 40) + 8} bytes, the file has {len(raw)}" in message


def test_overlapping_tensors(own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path]) -> None:
    """Two experts that are the same bytes would run, and nobody would see why the text is worse."""
    file, other = own_checkpoint / "model.safetensors", EXPERT.replace(".5.", ".6.")
    places: dict[str, list[int]] = {}

    def overlap(header: dict[str, dict[str, object]]) -> None:
        header[other]["data_offsets"] = header[EXPERT]["data_offsets"]
        places["at"] = header[EXPERT]["data_offsets"]  # type: ignore[assignment]

    _edit_header(file, overlap)
    begin, end = places["at"]
    message = _refused(pack, own_checkpoint, tmp_path, good)
    assert f"{file}: {other} overlaps {EXPERT}: it begins at byte {begin} of the data, " in message
    assert f"{EXPERT} ends at {end}; fetch this file again" in message


def test_bytes_that_are_no_tensors(own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path]) -> None:
    file = own_checkpoint / "model.safetensors"
    _edit_header(file, lambda header: header.pop(EXPERT))
    assert "leaves a gap after" in _refused(pack, own_checkpoint, tmp_path, good)


@pytest.mark.parametrize(
    "place", ["../other/model.safetensors", "/etc/model.safetensors", "sub/../../model.safetensors"]
)
def test_an_index_that_points_outside(
    tmp_path: Path, good: Path, pack: Callable[..., Path], place: str, tiny_checkpoint: Path
) -> None:
    sharded = tiny_mixtral(tmp_path / "sharded", max_shard_size="100KB")
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    index_file = sharded / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"][QUERY] = place
    index_file.write_text(json.dumps(index))
    message = _refused(pack, sharded, tmp_path, good)
    assert (
        message
        == f"{index_file}: {QUERY} is said to be in {place}, outside of the checkpoint's directory; fetch it again"
    )


def test_a_tensor_in_two_files_without_an_index(
    own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path]
) -> None:
    save_file({QUERY: torch.zeros(64, 64)}, own_checkpoint / "other.safetensors")
    message = _refused(pack, own_checkpoint, tmp_path, good)
    assert f"{own_checkpoint / 'other.safetensors'}: {QUERY} is in model.safetensors too" in message


def test_with_an_index_its_file_is_meant(tmp_path: Path, tiny_checkpoint: Path) -> None:
    from moeflow.artifact.checkpoint import Checkpoint

    sharded = tiny_mixtral(tmp_path / "sharded", max_shard_size="100KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    for file in {*index.values()} - {index[QUERY]}:
        tensors = load_file(sharded / file)
        save_file({**tensors, QUERY: torch.zeros(64, 64)}, sharded / file)
    assert torch.equal(Checkpoint.open(sharded).read(QUERY), Checkpoint.open(tiny_checkpoint).read(QUERY))


# -- tensors -----------------------------------------------------------------------------------------------


def test_a_misnamed_matrix_of_an_expert(
    own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path]
) -> None:
    _rewrite(own_checkpoint, lambda tensors: _rename(tensors, EXPERT, EXPERT.replace("w1", "w4")))
    message = _refused(pack, own_checkpoint, tmp_path, good)
    assert message == f"{own_checkpoint}: layer 1, expert 5 lacks gate; the download may be incomplete"


def test_a_misnamed_resident_tensor(
    own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path]
) -> None:
    _rewrite(own_checkpoint, lambda tensors: _rename(tensors, QUERY, QUERY.replace("q_proj", "query")))
    message = _refused(pack, own_checkpoint, tmp_path, good)
    assert f"{own_checkpoint}: 1 tensors have no place in transformers' MixtralForCausalLM" in message
    assert f"first {QUERY.replace('q_proj', 'query')}; 1 parameters" in message
    assert f"have no tensor, first {QUERY}; fetch the config and all weight files" in message


def test_a_resident_tensor_of_another_shape(
    own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path]
) -> None:
    _rewrite(own_checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).bfloat16()}))
    message = _refused(pack, own_checkpoint, tmp_path, good)
    assert "model.norm.weight has shape [32], transformers' MixtralForCausalLM needs [64]" in message


@pytest.mark.parametrize("name", [EXPERT, QUERY])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none(
    own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path], name: str, value: float
) -> None:
    """Found while it is packed: what is there is whole, the next run of the mended checkpoint goes on from it."""
    whole = own_checkpoint / "model.safetensors"
    kept = shutil.copy2(whole, tmp_path / "kept")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][7, 9] = tensors[name][8, 1] = value

    _rewrite(own_checkpoint, damage)
    with pytest.raises(CheckpointError) as caught:
        pack(own_checkpoint, tmp_path / "new")
    assert str(caught.value) == (
        f"{whole}: {name} holds NaN or infinity in 2 of 4096 numbers, first at [7, 9]; fetch this file again"
    )
    assert not (tmp_path / "new" / "manifest.json").exists()
    assert not list((tmp_path / "new").rglob("*.part"))
    present = Path(shutil.copytree(good, tmp_path / "present"))
    with pytest.raises(CheckpointError, match="in 2 of 4096 numbers"):
        pack(own_checkpoint, present, overwrite=True)
    assert _content(present) == _content(good)
    shutil.copy2(kept, whole)
    mended, expected = (_content(directory) for directory in (pack(own_checkpoint, tmp_path / "new"), good))
    assert all(mended[file] == expected[file] for file in expected if file.endswith(".safetensors"))


# -- settings ----------------------------------------------------------------------------------------------


def test_a_group_that_does_not_divide(
    tiny_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path]
) -> None:
    scheme = {"backend": "hqq", "bits": 4, "group_size": 128}
    message = _refused(pack, tiny_checkpoint, tmp_path, good, {"experts": scheme})
    assert "128" in message
    assert "group_size 64, 32, 16 would fit" in message


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_bits_that_hqq_does_not_have(
    tiny_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path], bits: int
) -> None:
    message = _refused(pack, tiny_checkpoint, tmp_path, good, {"experts": {"backend": "hqq", "bits": bits}})
    assert f"quantization.experts.bits is {bits}; hqq supports 2, 3, 4, 8" in message


# -- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "mxfp8"}, "mxfp8"),
        ({"bits": 4}, "no quant_method"),
        ("gptq", "gptq"),
    ],
    ids=str,
)
def test_weights_that_somebody_quantized(
    own_checkpoint: Path, tmp_path: Path, good: Path, pack: Callable[..., Path], settings: object, name: str
) -> None:
    file = own_checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    assert _refused(pack, own_checkpoint, tmp_path, good) == (
        f"{file}: quantization_config says {name!r}; moeflow packs plain weights and those released as mxfp4 or fp8; "
        "use the model's unquantized upload"
    )
