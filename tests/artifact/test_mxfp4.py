"""MXFP4 against a reading of its definition bit by bit, and against transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeflow.artifact.mxfp4 import mxfp4_tensors
from moeflow.artifact.safetensors import read_header
from moeflow.artifact.stored import Stored
from moeflow.errors import CheckpointError

NAME = "model.layers.0.mlp.experts.down_proj"


def _stored(directory: Path, tensors: dict[str, torch.Tensor], dtype: str = "BF16") -> dict[str, Stored]:
    save_file(tensors, directory / "a.safetensors")
    headers = read_header(directory / "a.safetensors", CheckpointError).tensors
    return mxfp4_tensors(headers, dtype, directory / "config.json")


def _matrix(directory: Path, blocks: torch.Tensor, scales: torch.Tensor, dtype: str = "BF16") -> Stored:
    return _stored(directory, {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}, dtype)[NAME]


def _random(scales: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte twice in 2 experts of 4 rows and 4 blocks, scales from a range with both ends of it."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(256, generator=generator) for _ in range(2)])
    codes = torch.randint(*scales, (2, 4, 4), generator=generator)
    codes[0, 0, 0], codes[1, 3, 3] = scales[0], scales[1] - 1
    return order.to(torch.uint8).view(2, 4, 4, 16), codes.to(torch.uint8)


def _e2m1(code: int) -> float:
    """One sign bit, two of exponent with a bias of 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if sign else value


def _slowly(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 `[E, K, N]`, a number at a time."""
    experts, rows, groups, _ = blocks.shape
    values = torch.empty(experts, groups * 32, rows, dtype=torch.float64)
    for e in range(experts):
        for n in range(rows):
            for g in range(groups):
                scale = 2.0 ** (int(scales[e, n, g]) - 127)
                for b in range(16):
                    byte = int(blocks[e, n, g, b])
                    values[e, 32 * g + 2 * b, n] = _e2m1(byte & 15) * scale
                    values[e, 32 * g + 2 * b + 1, n] = _e2m1(byte >> 4) * scale
    return values


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("scales", [(0, 253), (0, 2), (120, 135), (251, 253)], ids=str)
def test_every_byte_under_every_scale_is_exact(tmp_path: Path, scales: tuple[int, int], dtype: str) -> None:
    """6 * 2**125 is the largest product that bfloat16 and float32 hold, 2**-128 the least: nothing rounds."""
    blocks, codes = _random(scales)
    stored = _matrix(tmp_path, blocks, codes, dtype)
    expected = _slowly(blocks, codes)
    assert (stored.info.name, stored.info.shape) == (NAME, (2, 128, 4))
    assert torch.equal(stored.read().double(), expected)
    for expert in range(2):
        assert torch.equal(stored.read(expert).double(), expected[expert])
        assert stored.read(expert).T.is_contiguous()


def test_it_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    blocks, codes = _random((100, 150))
    assert torch.equal(_matrix(tmp_path, blocks, codes).read(), _convert_moe_packed_tensors(blocks, codes))


def test_only_the_expert_that_is_asked_for_is_read(tmp_path: Path) -> None:
    blocks, codes = _random((100, 150))
    codes[1, 2, 3] = 255
    stored = _matrix(tmp_path, blocks, codes)
    assert torch.isfinite(stored.read(0)).all()
    with pytest.raises(CheckpointError) as caught:
        stored.read(1)
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'}: {NAME}_scales holds NaN or infinity in 1 of 16 numbers, first at [2, 3]; "
        "fetch this file again"
    )


def test_products_that_no_dtype_holds_are_infinite_and_so_refused_when_packed(tmp_path: Path) -> None:
    blocks = torch.full((1, 1, 1, 16), 0x77, dtype=torch.uint8)
    codes = torch.full((1, 1, 1), 254, dtype=torch.uint8)
    assert torch.isinf(_matrix(tmp_path, blocks, codes).read()).all()


def test_what_is_not_mxfp4_stays_as_it_is(tmp_path: Path) -> None:
    tensors = {"norm": torch.ones(4), "proj_bias": torch.randn(3).bfloat16(), f"{NAME}_scales": torch.ones(3)}
    stored = _stored(tmp_path, tensors)
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in tensors.items())


BLOCKS, SCALES = torch.zeros(2, 4, 3, 16, dtype=torch.uint8), torch.zeros(2, 4, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{NAME}_blocks": BLOCKS}, f"{NAME}_blocks has no {NAME}_scales beside it"),
        ({f"{NAME}_scales": SCALES}, f"{NAME}_scales has no {NAME}_blocks beside it"),
        ({f"{NAME}_blocks": BLOCKS, f"{NAME}_scales": SCALES[:, :3].contiguous()}, r"\[2, 4, 3, 16\] .* \[2, 3, 3\]"),
        ({f"{NAME}_blocks": BLOCKS[..., :8].contiguous(), f"{NAME}_scales": SCALES}, r"\[2, 4, 3, 8\]"),
        ({f"{NAME}_blocks": BLOCKS[0].clone(), f"{NAME}_scales": SCALES[0].clone()}, r"\[4, 3, 16\]"),
        ({f"{NAME}_blocks": BLOCKS, f"{NAME}_scales": SCALES.float()}, r"\[2, 4, 3\] in F32"),
    ],
    ids=["no scales", "no blocks", "other shape", "half a block", "no experts", "other dtype"],
)
def test_codes_and_scales_that_do_not_belong_together(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        _stored(tmp_path, tensors)
    assert str(tmp_path / "config.json") in str(caught.value)
