"""`(code - zero) * scale` against numpy in float64, from codes that never were packed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from moeflow.kernels.dequantize import affine
from moeflow.kernels.packing import pack

# In float32, a difference and a product round once each.
FLOAT32_EPSILON = 2.0**-23


def _random(bits: int, group: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Codes [N, K], pairs [N, K / group, 2] in float16, and float64's answer."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = np.random.default_rng(seed)
    rows, groups = int(draw.integers(1, 9)), 256 // group * int(draw.integers(1, 4))
    codes = draw.integers(0, 1 << bits, (rows, groups * group))
    scale = draw.standard_normal((rows, groups)) * 10.0 ** draw.integers(-4, 3)
    zero = draw.uniform(-2, (1 << bits) + 2, (rows, groups))
    pairs = np.stack([scale, zero], axis=-1).astype(np.float16)
    exact = pairs.astype(np.float64).repeat(group, axis=1)
    return codes, pairs, torch.from_numpy((codes - exact[..., 1]) * exact[..., 0])


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_float32_is_the_formula_to_rounding(bits: int, group: int) -> None:
    codes, pairs, expected = _random(bits, group)
    words, high = pack(torch.from_numpy(codes), bits)
    result = affine(words, high, torch.from_numpy(pairs), bits, torch.float32)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=2 * FLOAT32_EPSILON, atol=0)


@pytest.mark.parametrize(("dtype", "mantissa"), [(torch.float16, 10), (torch.bfloat16, 7)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_narrow_results_are_rounded_once(bits: int, dtype: torch.dtype, mantissa: int) -> None:
    codes, pairs, expected = _random(bits, 64)
    words, high = pack(torch.from_numpy(codes), bits)
    result = affine(words, high, torch.from_numpy(pairs), bits, dtype)
    assert result.dtype == dtype
    half_a_step = 2.0 ** -(mantissa + 1) + 4 * FLOAT32_EPSILON
    smallest = 2.0**-25 if dtype == torch.float16 else 0  # half of float16's smallest subnormal
    torch.testing.assert_close(result.double(), expected, rtol=half_a_step, atol=smallest)


def test_a_group_uses_its_own_scale_and_zero() -> None:
    codes = torch.ones(2, 64, dtype=torch.uint8)
    pairs = torch.tensor([[[1.0, 0], [2, 0]], [[1, -3], [0, 5]]], dtype=torch.float16)  # [2, 64 / 32, 2]
    words, high = pack(codes, 4)
    result = affine(words, high, pairs, 4, torch.float32)
    assert result[:, ::32].tolist() == [[1, 2], [4, 0]]
    assert result[:, 31::32].tolist() == [[1, 2], [4, 0]]


def test_the_packed_parts_are_not_changed() -> None:
    codes, pairs, _ = _random(3, 64)
    words, high = pack(torch.from_numpy(codes), 3)
    assert high is not None
    parts = [words, high, torch.from_numpy(pairs)]
    before = [part.clone() for part in parts]
    affine(*parts, 3, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, parts, strict=True))
