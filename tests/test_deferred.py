"""Deferred sums: taken over by a norm, or computed by whoever looks, once and with the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeflow.kernels.junction import ExpertSum
from moeflow.model.deferred import Deferred, Sum


def deferred(shape: tuple[int, ...] = (2, 8)) -> tuple[Deferred, Tensor, list[int]]:
    """One that gives random numbers, these numbers, and a list that grows when they are computed."""
    memory, numbers, calls = torch.full(shape, float("nan")), torch.randn(shape), []
    recipe = ExpertSum(torch.randn(4, shape[-1]), torch.rand(2, 2))

    def compute() -> None:
        calls.append(1)
        memory.copy_(numbers)

    return Deferred.of(memory, recipe, compute), numbers, calls


def test_facts_and_views_compute_nothing() -> None:
    x, numbers, calls = deferred()
    views = [x.view(1, 2, 8), x.reshape(2, 2, 4), x.contiguous(), x.unsqueeze(0)]
    assert x.shape == (2, 8) and x.dtype == torch.float32 and x.dim() == 2 and x.device.type == "cpu"
    assert not calls and all(isinstance(view, Deferred) and view.recipe is x.recipe for view in views)
    assert torch.equal(views[0] * 1, numbers[None]) and torch.equal(x * 1, numbers) and len(calls) == 1
    assert type(views[1] * 1) is Tensor


@pytest.mark.parametrize(
    "look",
    [lambda x: x * 2, torch.relu, lambda x: x.tolist(), lambda x: torch.cat([x, x]), lambda x: x.data_ptr(),
     lambda x: x[0], lambda x: x.T, lambda x: x.mT, lambda x: x.data,
     lambda x: torch.nn.functional.linear(x, torch.ones(3, 8)), lambda x: x.add_(1), repr],
)  # fmt: skip
def test_whoever_looks_finds_numbers(look: object) -> None:
    x, numbers, calls = deferred()
    expected = look(numbers.clone())  # type: ignore[operator]
    found = look(x)  # type: ignore[operator]
    assert len(calls) == 1
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("turn", [False, True])
def test_adding_gives_a_recipe_for_both(turn: bool) -> None:
    x, numbers, calls = deferred()
    residual = torch.randn(2, 8)
    total = x + residual if turn else residual + x
    assert isinstance(total, Deferred) and not calls
    assert isinstance(total.recipe, Sum) and total.recipe.residual is residual and total.recipe.added is x.recipe
    view = total.view(1, 2, 8)
    assert torch.equal(view.clone(), (residual + numbers)[None]) and len(calls) == 1
    assert total.recipe is None and torch.equal(total.finish(), residual + numbers) and len(calls) == 1


def test_a_sum_that_was_taken_over_is_not_computed_again() -> None:
    x, _, calls = deferred()
    total = torch.zeros(2, 8) + x
    total.memory.fill_(3.0)
    total.done()
    assert torch.equal(total * 1, torch.full((2, 8), 3.0)) and not calls


def test_a_chain_of_residuals() -> None:
    first, one, _ = deferred()
    second, two, _ = deferred()
    residual = torch.randn(2, 8)
    middle = residual + first
    end = middle + torch.ones(2, 8)
    assert isinstance(end, Deferred) and isinstance(end.recipe, Sum) and middle.recipe is None
    last = end + second
    assert torch.allclose(last.finish(), residual + one + 1 + two)


def test_what_cannot_be_added_row_by_row_is_added_by_torch() -> None:
    for other in (torch.randn(8), torch.randn(2, 8).double(), 2.0):
        x, numbers, calls = deferred()
        found = x + other
        assert type(found) is Tensor and torch.equal(found, numbers + other) and calls
    x, numbers, _ = deferred((8, 8))
    odd = torch.randn(8, 8).T
    assert torch.equal(odd + x, odd + numbers)
