"""Tensors that are computed when they are first looked at, unless who takes them over computes them on the way.

Between two products of a decoding step transformers' layers write `residual + experts(...)` and hand the sum to a norm.
Each would be a launch; one kernel does all of it (`kernels.junction`), but no module sees the whole. So the experts
give a `Deferred`, adding it to a tensor gives another, and a norm that meets one asks for its recipe and computes sum
and norm at once. Whoever else touches a `Deferred` (any operation but those below) finds its numbers there, computed at
that moment: forward passes need not know of it, and nothing is ever computed twice.

Rotation and growth of the cache before attention are put off alike, and taken over by it (`kernels.attention`).

A `Deferred` has its memory from the start, so views of it may be taken before it is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeflow.kernels.junction import ExpertSum

__all__ = ["Appended", "Deferred", "Rotated", "Sum"]


@dataclass(frozen=True)
class Sum:
    """A residual connection: both parts, of the same shape; the first is computed already."""

    residual: Tensor
    added: Tensor | ExpertSum


@dataclass(frozen=True)
class Rotated:
    """A query or key turned by its positions' angles."""

    x: Tensor
    """[1, H, T, D]"""
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Appended:
    """A static cache's keys or values after a step's own were appended."""

    key: Rotated
    value: Tensor
    length: Tensor
    """That of the cache, not yet moved on."""


Recipe = Sum | ExpertSum | Rotated | Appended


@dataclass
class _State:
    """What all views of one deferred tensor share."""

    recipe: Recipe | None
    """None once it is computed."""
    compute: Callable[[], None] | None


VIEWS = frozenset({"view", "reshape", "contiguous", "unsqueeze", "squeeze", "flatten"})
SUMS = frozenset({"add", "__add__", "__radd__"})
# What looks at no number: methods, and attributes (others, as `.T`, are views that would see what is not there yet).
FACTS = frozenset({
    "size", "dim", "numel", "stride", "is_contiguous", "element_size", "storage_offset", "__len__", "is_floating_point",
    "is_complex", "get_device", "nelement", "ndimension",
})  # fmt: skip
ATTRIBUTES = frozenset({
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse",
    "is_quantized", "is_nested", "is_leaf", "itemsize", "nbytes", "grad_fn", "_version",
})  # fmt: skip


class Deferred(Tensor):
    """See the module. Made by `of`."""

    _state: _State

    @classmethod
    def of(cls, memory: Tensor, recipe: Recipe, compute: Callable[[], None]) -> Deferred:
        """A tensor over `memory`, which `compute` fills as `recipe` says."""
        return cls._over(memory, _State(recipe, compute))

    @classmethod
    def together(cls, memories: Sequence[Tensor], recipe: Recipe, compute: Callable[[], None]) -> list[Deferred]:
        """Tensors that are computed at once."""
        state = _State(recipe, compute)
        return [cls._over(memory, state) for memory in memories]

    @classmethod
    def _over(cls, memory: Tensor, state: _State) -> Deferred:
        found = memory.as_subclass(cls)
        found._state = state
        return found

    @property
    def recipe(self) -> Recipe | None:
        """How it is to be computed; None if it has been."""
        return self._state.recipe

    @property
    def memory(self) -> Tensor:
        """The plain tensor, computed or not."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def done(self) -> None:
        """Take note that its memory was filled by somebody else."""
        self._state.recipe = self._state.compute = None

    def finish(self) -> Tensor:
        """The plain tensor, computed now if it was not before."""
        compute = self._state.compute
        if compute is not None:
            compute()
            self.done()
        return self.memory

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out `func`, on computed numbers unless it needs none."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        if (name in FACTS or attribute in ATTRIBUTES) and isinstance(args[0], Deferred):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in VIEWS and isinstance(args[0], Deferred) and args[0].recipe is not None:
            first = args[0]
            with torch._C.DisableTorchFunctionSubclass():
                view = func(first.as_subclass(Tensor), *args[1:], **kwargs)
            if view.data_ptr() == first.memory.data_ptr():
                return cls._over(view, first._state)
        if name in SUMS and len(args) == 2 and not kwargs and _alike(*args):
            return _add(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_finished(args), **{key: _finished(value) for key, value in kwargs.items()})


def _alike(first: Any, second: Any) -> bool:
    """Whether both are tensors that a kernel can add row by row."""
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return first.shape == second.shape and first.dtype == second.dtype and first.device == second.device


def _add(first: Tensor, second: Tensor) -> Tensor:
    """The sum, deferred; whatever of its parts must be there first is computed."""
    if isinstance(first, Deferred) and isinstance(first.recipe, ExpertSum):
        first, second = second, first  # a sum of two numbers does not depend on their order
    residual = first.finish() if isinstance(first, Deferred) else first
    recipe = second.recipe if isinstance(second, Deferred) else None
    added = second.finish() if isinstance(second, Deferred) and not isinstance(recipe, ExpertSum) else second
    if not (residual.is_contiguous() and added.is_contiguous()):
        return torch.add(residual, added.finish() if isinstance(added, Deferred) else added)
    memory = torch.empty_like(residual)

    def compute() -> None:
        torch.add(residual, added.finish() if isinstance(added, Deferred) else added, out=memory)

    return Deferred.of(memory, Sum(residual, recipe if isinstance(recipe, ExpertSum) else added), compute)


def _finished(value: Any) -> Any:
    """`value` with plain, computed tensors in place of deferred ones."""
    if isinstance(value, Deferred):
        return value.finish()
    if isinstance(value, tuple | list):
        parts = map(_finished, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
