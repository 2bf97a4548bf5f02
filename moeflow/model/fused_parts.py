"""Kernels for three parts of transformers' models: RMS norms, rotary positions, the growth of a static cache.

Each is compared with transformers' own code on random numbers before it is offered to `Fused`, which decides when it
stands in; and each leaves to that code whatever the kernel does not take.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeflow.kernels import dense
from moeflow.kernels.attention import MOST_TOKENS
from moeflow.kernels.junction import join, join_refuses
from moeflow.kernels.launcher import Launcher
from moeflow.model.deferred import Appended, Deferred, Rotated, Sum
from moeflow.model.inputs import Inputs

if TYPE_CHECKING:
    from moeflow.model.fused import Fused

__all__ = ["Scope", "fuse_cache", "fuse_norms", "fuse_rotary"]

ROTARY = "apply_rotary_pos_emb"


@dataclass(eq=False)
class Scope:
    """What a replacement knows of the `Fused` that holds it: apart, so that no cycle keeps a closed engine's memory."""

    launcher: Launcher
    dtype: torch.dtype
    """Of the model's hidden states."""
    inputs: Inputs
    """What products share."""
    thread: int | None = None
    """Who is within `Fused.active`."""

    @property
    def entered(self) -> bool:
        """Whether this thread is."""
        return self.thread == threading.get_ident()


def _near(found: Tensor, expected: Tensor) -> bool:
    """Whether they differ by rounding."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    step = 4 * torch.finfo(found.dtype).eps
    return torch.allclose(found.float(), expected.float(), rtol=step, atol=step)


def _random(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))  # leaves the process's random numbers alone
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def fuse_norms(fused: Fused, model: nn.Module) -> None:
    """Modules whose class is called RMSNorm and computes one."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not kind.endswith("RMSNorm"):
            continue
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
            fused.declined(kind, f"{name} has no weight or no epsilon")
            continue
        late = _rounding(fused.scope.launcher, module, weight, eps)
        if isinstance(late, str):
            fused.declined(kind, f"{name}: {late}")
        else:
            fused.replace("norms", module, "forward", _norm(fused.scope, module, eps, late))


def _rounding(launcher: Launcher, module: nn.Module, weight: Tensor, eps: float) -> bool | str:
    """Whether this norm rounds once, after the weight; a reason if it is another function."""
    x, other = 3 * _random(weight, 1, 3, weight.numel()), _random(weight, weight.numel())
    if reason := dense.norm_refuses(x, weight):
        return reason
    expected = torch.func.functional_call(module, {"weight": other}, (x,))
    found = {late: dense.norm(launcher, x, other, eps, late) for late in (False, True)}
    wrong = {late: int((y != expected).sum()) for late, y in found.items() if _near(y, expected)}
    return min(wrong, key=lambda late: wrong[late]) if wrong else "computes something else"


def _norm(scope: Scope, module: Any, eps: float, late: bool) -> Callable[..., Any]:
    original, maker = module.forward, object()

    def forward(x: Tensor, *rest: Any, **options: Any) -> Any:
        if not scope.entered or rest or options:
            return original(x, *rest, **options)
        recipe = x.recipe if isinstance(x, Deferred) else None
        residual, added = (recipe.residual, recipe.added) if isinstance(recipe, Sum) else (_plain(x), None)
        product = scope.inputs.wanted(maker)
        if (added is None and product is None) or join_refuses(residual, added, module.weight):
            normal = _plain(x).contiguous()
            if dense.norm_refuses(normal, module.weight):
                return original(normal)
            normal = dense.norm(scope.launcher, normal, module.weight, eps, late)
            scope.inputs.offer(normal, maker)
            return normal
        total = x.memory if isinstance(x, Deferred) and added is not None else None
        joined = join(scope.launcher, residual, added, module.weight, eps, late, product, total)
        if isinstance(x, Deferred):
            x.done()
        scope.inputs.offer(joined.normal, maker, product, joined.prepared)
        return joined.normal

    return forward


def _plain(x: Tensor) -> Tensor:
    return x.finish() if isinstance(x, Deferred) else x


def fuse_rotary(fused: Fused, model: nn.Module) -> None:
    """The function that all layers of a modeling module call: query and key in one launch."""
    homes = {type(m).__module__: getattr(m, "head_dim", 64) for m in model.modules() if hasattr(m, "layer_idx")}
    for name, width in homes.items():
        home = sys.modules[name]
        original = vars(home).get(ROTARY)
        if original is None:
            fused.declined("rotary positions", f"{name.rpartition('.')[2]} has no {ROTARY}")
        elif not (shares := _shares(fused.scope.launcher, original, next(model.parameters()), int(width))):
            fused.declined("rotary positions", f"{name.rpartition('.')[2]} computes something else")
        else:
            fused.replace("rotary function", home, ROTARY, _rotary(fused.scope, home, shares))


def _shares(launcher: Launcher, original: Callable[..., Any], like: Tensor, width: int) -> frozenset[int]:
    """For which tables, of 1/1 or 1/2 of a head's width, the kernel is `original`."""
    found = set()
    q, k = _random(like, 1, 3, 4, width).transpose(1, 2), _random(like, 1, 3, 2, width).transpose(1, 2)
    for share in (1, 2):
        cos, sin = _random(like, 1, 3, width // share), _random(like, 1, 3, width // share).flip(-1)
        try:
            expected = original(q, k, cos, sin)
        except (RuntimeError, TypeError, ValueError):
            continue
        if dense.rotate_refuses(q, k, cos, sin) is None:
            results = dense.rotate(launcher, q, k, cos, sin)
            if all(_near(a, b) for a, b in zip(results, expected, strict=True)):
                found.add(share)
    return frozenset(found)


def _rotary(scope: Scope, home: ModuleType, shares: frozenset[int]) -> Callable[..., Any]:
    original = vars(home)[ROTARY]

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        usual = not scope.entered or rest or options.get("unsqueeze_dim", 1) != 1 or options.keys() - {"unsqueeze_dim"}
        if usual or q.dim() != 4 or q.shape[2] > MOST_TOKENS or dense.rotate_refuses(q, k, cos, sin):
            return original(q, k, cos, sin, *rest, **options)
        if q.shape[3] // cos.shape[2] not in shares:
            return original(q, k, cos, sin, *rest, **options)
        return _put_off(scope, q, k, cos, sin)

    return rotate


def _put_off(scope: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys that are rotated by attention itself, or when somebody else looks."""
    results = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k)]

    def compute() -> None:
        for target, found in zip(results, dense.rotate(scope.launcher, q, k, cos, sin), strict=True):
            target.copy_(found)

    states = [Deferred.of(target, Rotated(x, cos, sin), compute) for target, x in zip(results, (q, k), strict=True)]
    return states[0], states[1]


def fuse_cache(fused: Fused) -> None:
    """What a static layer does with new keys and values: five operations of torch."""
    from transformers.cache_utils import StaticLayer

    for number, layer in enumerate(fused.cache.layers):
        if type(layer) is StaticLayer:
            fused.replace("cache layers", layer, "update", _update(fused.scope, layer))
        else:
            fused.declined("cache layers", f"layer {number} is a {type(layer).__name__}")


def _append(launcher: Launcher, k: Tensor, v: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> None:
    dense.append(launcher, _plain(k), v, *target)


def _update(scope: Scope, layer: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    original = layer.update

    def update(k: Tensor, v: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if not scope.entered or k.shape[2] > MOST_TOKENS or not layer.is_initialized:
            return original(_plain(k), v, *rest, **options)
        target = (layer.keys, layer.values, layer.cumulative_length)
        raw = k.memory if isinstance(k, Deferred) else k
        if dense.append_refuses(raw, v, *target):
            return original(_plain(k), v, *rest, **options)
        recipe = k.recipe if isinstance(k, Deferred) else None
        if not isinstance(recipe, Rotated):
            dense.append(scope.launcher, _plain(k), v, *target)
            return layer.keys, layer.values
        grown = partial(_append, scope.launcher, k, v, target)
        keys, values = Deferred.together(target[:2], Appended(recipe, v, layer.cumulative_length), grown)
        return keys, values

    return update
