"""Junctions on the emulator: the same rows as one operation after another gives, and the same layout as `prepare`."""

from __future__ import annotations

import random

import pytest
import torch
from gemv_checks import matrix_of
from torch import Tensor

from moeflow.kernels import dense
from moeflow.kernels.gemv import Gemv
from moeflow.kernels.junction import ExpertSum, join, join_refuses

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

FORMATS = [
    "hqq 2 64",
    "hqq 2 16 8",
    "hqq 3 64",
    "hqq 4 32",
    "hqq 8 128",
    "nf4",
    "int8",
    "none bfloat16",
    "none float32",
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def summed(added: ExpertSum, like: Tensor) -> Tensor:
    """In the router's order, each product and sum rounded once, as `combine`'s fused multiply-add does."""
    tokens, top_k = added.weights.shape
    products = added.results.double().view(tokens, top_k, -1)
    total = torch.zeros(tokens, products.shape[-1], dtype=torch.float32)
    for k in range(top_k):
        total = (total.double() + added.weights[:, k, None].double() * products[:, k]).float()
    return total.to(like.dtype).view(like.shape)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("added", ["nothing", "tensor", "experts"])
def test_a_junction_is_its_operations_one_after_another(name: str, added: str) -> None:
    launcher = emulator.EmulatedLauncher(random.choice(emulator.ORDERS), seed=random.randrange(1 << 30))
    dtype, tokens, columns = random.choice(DTYPES), random.choice([1, 3]), random.choice([128, 640, 4096])
    late = random.random() < 0.5
    residual, weight = torch.randn(1, tokens, columns).to(dtype), torch.randn(columns).to(dtype)
    other: Tensor | ExpertSum | None = None
    expected = residual
    if added == "tensor":
        other = torch.randn_like(residual)
        expected = residual + other
    elif added == "experts":
        weights = torch.rand(tokens, 3).to(random.choice(DTYPES))
        other = ExpertSum(torch.randn(tokens * 3, columns), weights)
        expected = residual + summed(other, residual)
    gemv = Gemv(launcher, matrix_of(name, 8, columns), torch.device("cpu"))
    assert join_refuses(residual, other, weight) is None
    found = join(launcher, residual, other, weight, 1e-5, late, gemv)
    assert torch.equal(found.total, expected)
    normal = dense.norm(launcher, expected, weight, 1e-5, late)
    assert torch.equal(found.normal, normal)
    prepared = gemv.prepare(normal.view(tokens, columns))
    assert found.prepared is not None
    chunks = prepared.scales.shape[1]
    if not name.startswith("none"):
        assert torch.equal(found.prepared.scales, prepared.scales)
    if name.startswith("hqq"):
        assert torch.equal(found.prepared.sums, prepared.sums)
    there = torch.zeros(prepared.pieces.shape[1], dtype=torch.bool)  # beyond the last chunk there is nothing to compare
    vectors = prepared.pieces.shape[1] // (-(-chunks // 32) * 32)
    for chunk in range(chunks):
        there[[(chunk // 32 * vectors + v) * 32 + chunk % 32 for v in range(vectors)]] = True
    assert torch.equal(found.prepared.pieces[:, there], prepared.pieces[:, there])


def test_rows_too_wide_for_shared_memory_are_left_to_prepare() -> None:
    launcher = emulator.EmulatedLauncher()
    gemv = Gemv(launcher, matrix_of("none float32", 8, 16384), torch.device("cpu"))
    residual, weight = torch.randn(1, 16384), torch.randn(16384)
    found = join(launcher, residual, None, weight, 1e-5, product=gemv)
    assert found.prepared is None and found.total is residual
    assert torch.equal(found.normal, dense.norm(launcher, residual, weight, 1e-5))


def test_refusals() -> None:
    x, weight = torch.randn(1, 64), torch.randn(64)
    assert join_refuses(x, x[:, :32], weight) and join_refuses(x, x.half(), weight)
    assert join_refuses(x, ExpertSum(torch.randn(2, 64).half(), torch.rand(1, 2)), weight)
    assert join_refuses(x[:, ::2], None, weight[::2].contiguous())
