"""FP8 against a reading of its definition bit by bit, and against transformers."""

from __future__ import annotations

import random
from math import ldexp
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeflow.artifact.fp8 import fp8_tensors
from moeflow.artifact.safetensors import read_header
from moeflow.artifact.stored import Stored
from moeflow.errors import CheckpointError

NAME = "model.layers.0.self_attn.o_proj.weight"
FP8 = torch.float8_e4m3fn
NAN = (0x7F, 0xFF)


def _stored(
    directory: Path, tensors: dict[str, torch.Tensor], block: object = None, dtype: str = "BF16"
) -> dict[str, Stored]:
    save_file(tensors, directory / "a.safetensors")
    headers = read_header(directory / "a.safetensors", CheckpointError).tensors
    return fp8_tensors(headers, dtype, {"weight_block_size": block}, directory / "config.json")


def _generator() -> torch.Generator:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def _codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random bytes without NaN, every other one among them where there is room."""
    numbers = [b for b in range(256) if b not in NAN]
    count = int(np.prod(shape))
    draw = torch.tensor(numbers * (count // len(numbers) + 1), dtype=torch.uint8)[:count]
    return draw[torch.randperm(count, generator=generator)].view(shape)


def _e4m3(byte: int) -> float:
    """One sign bit, four of exponent with a bias of 7, three of mantissa; no infinity, and one NaN of each sign."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    assert (exponent, mantissa) != (15, 7)
    value = ldexp(mantissa, -9) if exponent == 0 else ldexp(8 + mantissa, exponent - 10)
    return -value if sign else value


def _bfloat16(value: np.float32) -> float:
    """Rounded to the nearest, ties to even, by the bits of the float32."""
    bits = int(value.view(np.uint32))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return float(np.uint32((rounded & 0xFFFF) << 16).view(np.float32))


def _slowly(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: str) -> torch.Tensor:
    """float64 `[N, K]`, a number at a time: the product in float32, then rounded to `dtype`."""
    values = torch.empty(codes.shape, dtype=torch.float64)
    with np.errstate(under="ignore"):
        for n in range(codes.shape[0]):
            for k in range(codes.shape[1]):
                scale = np.float32(scales[n // block[0], k // block[1]].item())
                product = np.float32(_e4m3(int(codes[n, k]))) * scale
                values[n, k] = _bfloat16(product) if dtype == "BF16" else float(product)
    return values


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("block", [(8, 8), (7, 5), (1, 4), (32, 32)], ids=str)
@pytest.mark.parametrize("magnitude", [-120, 0, 118])
def test_every_byte_in_whole_and_cut_blocks(tmp_path: Path, block: tuple[int, int], magnitude: int, dtype: str) -> None:
    """Scales near the least normal number, near 1, and so large that 448 of them are all that float32 holds."""
    generator = _generator()
    codes = _codes((20, 24), generator)
    grid = (-(-20 // block[0]), -(-24 // block[1]))
    scales = torch.ldexp(torch.rand(grid, generator=generator) + 0.5, torch.tensor(magnitude))
    scales[0, 0] = 0.0
    stored = _stored(tmp_path, {NAME: codes.view(FP8), f"{NAME}_scale_inv": scales}, [*block], dtype)[NAME]
    assert torch.equal(stored.read().double(), _slowly(codes, scales, block, dtype))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_scale_for_all(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes, scales = _codes((16, 20), _generator()), torch.full(shape, 0.037)
    stored = _stored(tmp_path, {NAME: codes.view(FP8), f"{NAME}_scale_inv": scales}, [128, 128])[NAME]
    assert torch.equal(stored.read().double(), _slowly(codes, scales.view(1, 1), (16, 20), "BF16"))


@pytest.mark.parametrize("stored_as", ["e8m0", "uint8"])
def test_scales_that_are_powers_of_two(tmp_path: Path, stored_as: str) -> None:
    generator = _generator()
    codes = _codes((16, 16), generator)
    powers = torch.randint(10, 240, (2, 4), generator=generator).to(torch.uint8)
    scales = powers.view(torch.float8_e8m0fnu) if stored_as == "e8m0" else powers
    stored = _stored(tmp_path, {NAME: codes.view(FP8), f"{NAME}_scale_inv": scales}, [8, 4], "F32")[NAME]
    plain = torch.exp2(powers.float() - 127)
    assert torch.equal(stored.read().double(), _slowly(codes, plain, (8, 4), "F32"))


@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 1), (3, 2, 4)], ids=str)
def test_all_experts_in_one_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    generator, name = _generator(), "model.layers.0.mlp.experts.gate_up_proj"
    codes = _codes((3, 16, 16), generator)
    scales = torch.rand(shape, generator=generator) + 0.5
    stored = _stored(tmp_path, {name: codes.view(FP8), f"{name}_scale_inv": scales}, [8, 4])[name]
    grid = scales.view(-1, 1, 1).expand(3, 1, 1) if len(shape) < 2 else scales
    block = (16 // grid.shape[1], 16 // grid.shape[2])
    for expert in range(3):
        expected = _slowly(codes[expert], grid[expert], block, "BF16")
        assert torch.equal(stored.read(expert).double(), expected)
        assert torch.equal(stored.read()[expert].double(), expected)


def test_it_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = _generator()
    codes = _codes((16, 24), generator).view(FP8)
    scales = torch.rand((2, 3), generator=generator)
    stored = _stored(tmp_path, {NAME: codes, f"{NAME}_scale_inv": scales}, [8, 8])[NAME]
    assert torch.equal(stored.read(), Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16))


@pytest.mark.parametrize("byte", NAN)
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, byte: int) -> None:
    codes = _codes((16, 16), _generator())
    codes[3, 5] = codes[9, 1] = byte
    stored = _stored(tmp_path, {NAME: codes.view(FP8), f"{NAME}_scale_inv": torch.ones(1, 1)})[NAME]
    with pytest.raises(CheckpointError) as caught:
        stored.read()
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'}: {NAME} holds NaN or infinity in 2 of 256 numbers, first at [3, 5]; "
        "fetch this file again"
    )


@pytest.mark.parametrize(
    "scales",
    [torch.tensor([[1.0, float("nan")]]), torch.tensor([[1.0, float("inf")]]), torch.tensor([[1, 255]]).byte()],
    ids=["nan", "inf", "255"],
)
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, scales: torch.Tensor) -> None:
    codes = _codes((16, 16), _generator())
    stored = _stored(tmp_path, {NAME: codes.view(FP8), f"{NAME}_scale_inv": scales})[NAME]
    with pytest.raises(CheckpointError, match=r"_scale_inv holds NaN or infinity in 1 of 2 numbers, first at \[0, 1\]"):
        stored.read()


def test_scales_of_activations_and_plain_tensors(tmp_path: Path) -> None:
    tensors = {
        NAME: torch.zeros(8, 8).to(FP8), f"{NAME}_scale_inv": torch.ones(1, 1), "norm.weight": torch.ones(8),
        "model.layers.0.self_attn.o_proj.activation_scale": torch.ones(()),
    }  # fmt: skip
    assert set(_stored(tmp_path, tensors)) == {NAME, "norm.weight"}


WEIGHT = torch.zeros(20, 24).to(FP8)


@pytest.mark.parametrize(
    ("tensors", "block", "message"),
    [
        ({NAME: WEIGHT}, [8, 8], f"{NAME} is stored as F8_E4M3 and has no scales beside it \\({NAME}_scale_inv, "),
        ({f"{NAME}_scale_inv": torch.ones(3, 3)}, [8, 8], "has the scales of a weight that is not there"),
        (
            {NAME: WEIGHT.float(), f"{NAME}_scale_inv": torch.ones(3, 3)}, [8, 8],
            "has the scales of a weight that is stored as F32, not F8_E4M3",
        ),
        (
            {NAME: WEIGHT, f"{NAME}_scale_inv": torch.ones(3, 5)}, [8, 8],
            r"\[20, 24\] and its scales .* \[3, 5\] in F32; needed are scales of blocks of 8 x 8",
        ),
        ({NAME: WEIGHT, f"{NAME}_scale_inv": torch.ones(3, 3)}, None, "a grid that divides the weight"),
        ({NAME: WEIGHT, f"{NAME}_scale_inv": torch.ones(3, 3).long()}, [8, 8], r"\[3, 3\] in I64"),
        ({NAME: WEIGHT, f"{NAME}_scale_inv": torch.ones(3, 3)}, [8], r"weight_block_size is \[8\]; it must be"),
        ({NAME: WEIGHT, f"{NAME}_scale_inv": torch.ones(3, 3)}, [0, 8], r"weight_block_size is \[0, 8\]"),
    ],
)  # fmt: skip
def test_codes_and_scales_that_do_not_belong_together(
    tmp_path: Path, tensors: dict[str, torch.Tensor], block: object, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        _stored(tmp_path, tensors, block)
    assert str(tmp_path / "config.json") in str(caught.value)
