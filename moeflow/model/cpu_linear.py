"""Packed linear layers on a CPU: few tokens meet packed weights, those of layers that share an input in one go.

Query, key and value projections are given the same tensor one after another. Who shares an input is learned from a
pass and not from names: the next time, the first of them computes the others' products too and keeps them ready. Each
product is the same whether it is made alone or with others.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from moeflow.kernels.cpu import CpuGemv, CpuVectors
from moeflow.model.products import Product, Products

__all__ = ["CpuLinears"]


class CpuLinears:
    """The few-token products of a model's packed layers, which are known by their kernels."""

    def __init__(self, products: Products):
        self._products = products
        self._input: weakref.ref[Tensor] | None = None
        self._asked: list[CpuGemv] = []  # that were given it, in their order
        self._ready: dict[CpuGemv, Tensor] = {}
        self._blobs: dict[CpuGemv, Tensor] = {}
        self._followers: dict[CpuGemv, list[CpuGemv]] = {}

    def multiply(self, gemv: CpuGemv, blob: Tensor, x: Tensor) -> Tensor:
        """x [.., K] through a layer: [T, N] in the dtype of x."""
        if self._input is None or self._input() is not x:
            self._learn()
            self._input = weakref.ref(x)
        self._asked.append(gemv)
        self._blobs[gemv] = blob
        if gemv not in self._ready:
            with_it = self._followers.get(gemv, []) if len(self._asked) == 1 else []
            self._compute([gemv, *with_it], x)
        return self._ready.pop(gemv).to(x.dtype)

    def _learn(self) -> None:
        """An input will not be asked for any more: those who read it belong together, unless one did not come."""
        if self._asked:
            first, *others = self._asked
            once = len(set(self._asked)) == len(self._asked)
            self._followers[first] = others if once and not self._ready else []
        self._asked, self._ready = [], {}

    def _compute(self, gemvs: Sequence[CpuGemv], x: Tensor) -> None:
        vectors: dict[tuple[int, ...], CpuVectors] = {}
        found = []
        for gemv in gemvs:
            struct = gemv.struct
            form = (struct.kind, struct.bits, struct.group)
            if form not in vectors:
                vectors[form] = gemv.prepare(x.reshape(-1, gemv.matrix.columns))
            out = torch.empty(vectors[form].struct.count, gemv.matrix.rows)
            found.append(Product(gemv, self._blobs[gemv], vectors[form], out))
        self._products.run(found)
        self._ready.update((product.gemv, product.out) for product in found)
