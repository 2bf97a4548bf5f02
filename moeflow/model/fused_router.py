"""Routers whose rule the kernel knows, in one launch: found by comparing the kernel with the module on random numbers.

A router is a module with one weight matrix [E, H], a `top_k`, and a forward pass that gives logits, weights and ids in
some order. Which of the kernel's rules it follows is not looked up by name: every rule is tried, and the one that gives
the module's own choice and weights stands in for it. What follows none of them is left to transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeflow.kernels.router import MOST_TOKENS, RouterKernel, Rule
from moeflow.model.routers import router_matrix

if TYPE_CHECKING:
    from moeflow.model.fused import Fused
    from moeflow.model.fused_parts import Scope

__all__ = ["fuse_routers"]

TRIALS = 4  # tokens of the comparison


def fuse_routers(fused: Fused, model: nn.Module) -> None:
    """Modules that give logits, weights and expert ids of hidden states."""
    for name, module in model.named_modules():
        top_k, matrix = getattr(module, "top_k", None), router_matrix(module)
        if not isinstance(top_k, int) or matrix is None or hasattr(module, "experts"):  # the block around a router
            continue
        found = _rule(fused.scope, module, matrix, top_k)
        if isinstance(found, str):
            fused.declined("routers", f"{name}: {found}")
        else:
            fused.replace("routers", module, "forward", _forward(fused.scope, module, *found))


def _rule(
    scope: Scope, module: Any, matrix: tuple[Tensor, Tensor | None], top_k: int
) -> tuple[RouterKernel, tuple[int, ...]] | str:
    """The kernel that computes this router, and which of its results stands where in the module's; or a reason."""
    weight, bias = matrix
    dtype = next((p.dtype for p in module.parameters() if p.dtype != torch.float32), scope.dtype)
    x = _tokens(weight, dtype)
    if reason := RouterKernel.refuses(x, weight, bias, top_k):
        return reason
    random = torch.Generator().manual_seed(weight.shape[0])
    trial = torch.randn(weight.shape, generator=random).to(weight) / weight.shape[1] ** 0.5
    values = dict(module.named_parameters())
    own = next(name for name, p in values.items() if p is weight)
    try:
        with torch.no_grad():
            results = torch.func.functional_call(module, {own: trial}, (x,))
    except Exception as error:  # a router may refuse in any way
        return f"it takes more than hidden states ({type(error).__name__})"
    places = _places(results, weight.shape[0], top_k)
    if places is None:
        return "it does not give logits, weights and ids"
    logits, weights, ids = (results[i] for i in places)
    if logits.dtype != weight.dtype:
        return f"logits are {logits.dtype}"
    for first, normalize in (("SCORES", True), ("SCORES", False), ("CHOICE", True)):
        rule = Rule(first, normalize, weights.dtype)
        found = RouterKernel(scope.launcher, trial, bias, top_k, rule)(x)
        if _agree(found, (logits, weights, ids)):
            return RouterKernel(scope.launcher, weight, bias, top_k, rule), places
    return "it chooses by another rule"


def _tokens(weight: Tensor, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(weight.shape[1])
    return 3 * torch.randn(TRIALS, weight.shape[1], generator=random).to(weight.device, dtype)


def _places(results: Any, experts: int, top_k: int) -> tuple[int, int, int] | None:
    """Where logits [T, E], weights [T, K] and ids [T, K] stand."""
    if not isinstance(results, Sequence) or len(results) != 3 or not all(isinstance(r, Tensor) for r in results):
        return None
    ids = [i for i, r in enumerate(results) if r.dtype == torch.int64 and r.shape == (TRIALS, top_k)]
    floats = [i for i, r in enumerate(results) if r.is_floating_point()]
    logits = [i for i in floats if results[i].shape == (TRIALS, experts)]
    if len(ids) != 1 or len(floats) != 2 or not logits:
        return None
    rest = [i for i in floats if i != logits[0]]  # as many choices as experts: logits come first
    return (logits[0], rest[0], ids[0]) if results[rest[0]].shape == (TRIALS, top_k) else None


def _agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether both chose the same experts with the same weights, up to rounding of the logits."""
    step = 8 * max(torch.finfo(t.dtype).eps for t in expected if t.is_floating_point())
    order = [t.argsort(-1) for t in (found[2], expected[2])]
    if not torch.equal(found[2].gather(-1, order[0]), expected[2].gather(-1, order[1])):
        return False
    weights = [t.gather(-1, o).float() for t, o in zip((found[1], expected[1]), order, strict=True)]
    return torch.allclose(weights[0], weights[1], atol=step, rtol=step) and torch.allclose(
        found[0].float(), expected[0].float(), atol=step, rtol=step
    )


def _forward(scope: Scope, module: Any, kernel: RouterKernel, places: tuple[int, ...]) -> Callable[..., Any]:
    original = module.forward
    matrix, choices, width = kernel.matrix, kernel.choices, kernel.matrix.shape[1]

    def forward(x: Tensor, *rest: Any, **options: Any) -> Any:
        if not scope.entered or rest or options or x.numel() > MOST_TOKENS * width or module.top_k != choices:
            return original(x, *rest, **options)
        rows = x.reshape(-1, width)
        if RouterKernel.refuses(rows, matrix, kernel.bias, choices):
            return original(x)
        results = kernel(rows)
        return tuple(result for _, result in sorted(zip(places, results, strict=True)))

    return forward
