"""Routers on the emulator against torch's own operations."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moeflow.kernels.router import RouterKernel, Rule

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")


def expected(logits: Tensor, choices: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """By a stable sort: of equal scores the lower index first."""
    exact = logits.float()
    if rule.first == "CHOICE":
        values, index = exact.sort(dim=-1, descending=True, stable=True)
        return values[:, :choices].softmax(-1), index[:, :choices]
    values, index = exact.softmax(-1).sort(dim=-1, descending=True, stable=True)
    values, index = values[:, :choices], index[:, :choices]
    return values / values.sum(-1, keepdim=True) if rule.normalize else values, index


@pytest.mark.parametrize(("experts", "choices"), [(8, 2), (3, 3), (32, 4), (33, 1), (128, 8), (300, 32)])
@pytest.mark.parametrize("first", ["SCORES", "CHOICE"])
def test_choices_and_weights(experts: int, choices: int, first: str) -> None:
    launcher = emulator.EmulatedLauncher(random.choice(emulator.ORDERS), seed=random.randrange(1 << 30))
    dtype = random.choice([torch.float32, torch.float16, torch.bfloat16])
    matrix_dtype = random.choice([dtype, torch.float32])
    tokens, columns = random.choice([1, 5, 8]), random.choice([64, 520])
    x, matrix = torch.randn(tokens, columns).to(dtype), torch.randn(experts, columns).to(matrix_dtype)
    bias = random.choice([None, torch.randn(experts).to(matrix_dtype)])
    rule = Rule(first, random.random() < 0.5, random.choice([torch.float32, dtype]))
    assert RouterKernel.refuses(x, matrix, bias, choices) is None
    router = RouterKernel(launcher, matrix, bias, choices, rule)
    for _ in range(2):  # what a launch leaves behind must not disturb the next
        logits, weights, index = router(x)
    exact = functional.linear(x.double(), matrix.double(), None if bias is None else bias.double())
    step = torch.finfo(matrix_dtype).eps
    assert (logits.double() - exact).abs().max() <= 2 * max(step, 1e-6) * exact.abs().max()
    wanted, chosen = expected(logits, choices, rule)
    assert torch.equal(index, chosen)
    assert (weights.double() - wanted.double()).abs().max() <= 2 * max(torch.finfo(rule.weight_dtype).eps, 1e-6)


def test_of_equal_scores_the_lower_index_comes_first() -> None:
    x, matrix = torch.ones(1, 8), torch.zeros(40, 8)
    matrix[[35, 3, 17]] = 1.0
    router = RouterKernel(emulator.EmulatedLauncher("random"), matrix, None, 5, Rule("SCORES", True, torch.float32))
    assert router(x)[2].tolist() == [[3, 17, 35, 0, 1]]


def test_what_is_no_number_names_experts_that_exist() -> None:
    x, matrix = torch.full((1, 8), float("nan")), torch.randn(6, 8)
    router = RouterKernel(emulator.EmulatedLauncher(), matrix, None, 3, Rule("SCORES", True, torch.float32))
    assert 0 <= int(router(x)[2].min()) <= int(router(x)[2].max()) < 6


def test_refusals() -> None:
    x, matrix = torch.randn(1, 16), torch.randn(4, 16)
    refuses = RouterKernel.refuses
    assert refuses(x, matrix, None, 2) is None
    assert (
        refuses(x, matrix.half(), None, 2)
        and refuses(x, matrix, None, 5)
        and refuses(x[:, :12], matrix[:, :12], None, 2)
    )
    assert refuses(x.expand(9, -1), matrix, None, 2) and refuses(x, matrix, torch.randn(3), 2)
