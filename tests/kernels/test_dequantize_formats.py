"""8-bit metadata, nf4 and int8 against numpy in float64, from numbers that never were quantized."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from moeflow.kernels.dequantize import NF4_CODEBOOK, affine, codebook, pairs, row_scaled
from moeflow.kernels.packing import pack

EPSILON = 2.0**-23  # float32's: twice what an operation rounds by
# Half a step of each dtype, and its smallest number's half.
DTYPES = {torch.float32: (EPSILON, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 0.0)}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _draw() -> np.random.Generator:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return np.random.default_rng(seed)


def _assert_rounded_once(result: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    half_a_step, smallest = DTYPES[dtype]
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(), torch.from_numpy(expected), rtol=half_a_step + 2 * EPSILON, atol=smallest
    )


def _metadata(draw: np.random.Generator, groups: int, rows: int = 5) -> tuple[np.ndarray, np.ndarray]:
    meta = draw.integers(0, 256, (rows, groups, 2)).astype(np.uint8)
    steps = draw.standard_normal((rows, -(-groups // 128), 4)).astype(np.float32)
    return meta, steps


def _pairs_one_by_one(meta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float64 [N, G, 2], and not a slice in sight."""
    rows, groups, _ = meta.shape
    result = np.empty((rows, groups, 2))
    for row in range(rows):
        for group in range(groups):
            scale_step, scale_offset, zero_step, zero_offset = steps[row, group // 128].astype(np.float64)
            scale_code, zero_code = (int(code) for code in meta[row, group])
            result[row, group] = scale_code * scale_step + scale_offset, zero_code * zero_step + zero_offset
    return result


@pytest.mark.parametrize("groups", [1, 16, 127, 128, 129, 256, 300])
def test_metadata_is_code_times_step_plus_offset(groups: int) -> None:
    meta, steps = _metadata(_draw(), groups)
    expected = torch.from_numpy(_pairs_one_by_one(meta, steps))
    result = pairs(torch.from_numpy(meta), torch.from_numpy(steps))
    assert result.dtype == torch.float32
    # The sum may cancel what the product rounded: the bound is of the product, 255 steps at most.
    largest = 255 * np.abs(steps).max()
    assert (result.double() - expected).abs().max() <= largest * EPSILON


def test_metadata_rounds_the_product_and_then_the_sum() -> None:
    """Bit for bit, as documented; a fused multiply-add would differ in some of so many."""
    meta, steps = _metadata(_draw(), 512, rows=20)
    spread = steps.repeat(128, axis=1)
    expected = meta.astype(np.float32) * spread[..., ::2] + spread[..., 1::2]
    assert expected.dtype == np.float32
    assert torch.equal(pairs(torch.from_numpy(meta), torch.from_numpy(steps)), torch.from_numpy(expected))


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@dtypes
def test_pairs_from_metadata_serve_as_scales(dtype: torch.dtype, bits: int, group: int) -> None:
    draw = _draw()
    meta, steps = _metadata(draw, 160)
    steps = steps / 64  # float16 ends at 65504
    codes = draw.integers(0, 1 << bits, (5, 160 * group))
    exact = pairs(torch.from_numpy(meta), torch.from_numpy(steps))
    words, high = pack(torch.from_numpy(codes), bits)
    wide = exact.double().numpy().repeat(group, axis=1)
    expected = (codes - wide[..., 1]) * wide[..., 0]
    _assert_rounded_once(affine(words, high, exact, bits, dtype), expected, dtype)


@dtypes
def test_nf4_is_a_number_of_the_codebook_times_its_blocks_scale(dtype: torch.dtype) -> None:
    draw = _draw()
    rows, blocks = int(draw.integers(1, 9)), int(draw.integers(1, 9))
    codes = draw.integers(0, 16, (rows, 64 * blocks))
    scales = (np.abs(draw.standard_normal((rows, blocks))) * 10.0 ** draw.integers(-3, 3)).astype(np.float16)
    expected = np.array(NF4_CODEBOOK)[codes] * scales.astype(np.float64).repeat(64, axis=1)
    words, _ = pack(torch.from_numpy(codes), 4)
    _assert_rounded_once(codebook(words, torch.from_numpy(scales), dtype), expected, dtype)


@dtypes
def test_int8_is_a_signed_byte_times_its_rows_scale(dtype: torch.dtype) -> None:
    draw = _draw()
    rows, columns = int(draw.integers(1, 9)), 4 * int(draw.integers(1, 65))
    codes = draw.integers(-127, 128, (rows, columns)).astype(np.int8)
    scales = (np.abs(draw.standard_normal(rows)) * 10.0 ** draw.integers(-3, 2)).astype(np.float32)
    words = torch.from_numpy(codes.view("<i4").copy())
    assert torch.equal(words, pack(torch.from_numpy(codes.view(np.uint8)), 8)[0])  # as encode packs them
    expected = codes.astype(np.float64) * scales.astype(np.float64)[:, None]
    _assert_rounded_once(row_scaled(words, torch.from_numpy(scales), dtype), expected, dtype)


def test_the_packed_parts_are_not_changed() -> None:
    draw = _draw()
    meta, steps = (torch.from_numpy(a) for a in _metadata(draw, 130))
    words = torch.from_numpy(draw.integers(-(1 << 31), 1 << 31, (3, 16)).astype(np.int32))
    halves, wholes = torch.rand(3, 2).half(), torch.rand(3)
    parts = [meta, steps, words, halves, wholes]
    before = [part.clone() for part in parts]
    pairs(meta, steps)
    codebook(words, halves, torch.float32)
    row_scaled(words, wholes, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, parts, strict=True))
