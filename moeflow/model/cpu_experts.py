"""Experts on the CPU: those of a layer that few tokens chose in two products, all gate_ups, then all downs.

Each expert's vectors are laid out and gated by themselves, so that no result depends on which experts are computed
together. It neither finds blobs nor sums results: that is `experts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeflow.kernels.cpu import CpuVectors
from moeflow.model.products import PACKED_TOKENS, Product, Products
from moeflow.schema import Manifest, PlannedCpu

__all__ = ["CpuExperts", "Work"]


@dataclass(frozen=True)
class Work:
    """An expert and the tokens that chose it."""

    layout: int
    """Its blob's, among the manifest's."""
    blob: Tensor
    x: Tensor
    """[t, H]."""
    out: Tensor
    """[t, H], to be filled."""


class CpuExperts:
    """A model's experts by the CPU's kernels."""

    def __init__(self, manifest: Manifest, planned: PlannedCpu, products: Products):
        planes = 1 if planned.activations == "int8" else 2
        self._products = products
        self._gemvs = [[products.gemv(m, planes) for m in layout.matrices] for layout in manifest.layouts]
        self.unpackers = [[products.unpacker(m) for m in layout.matrices] for layout in manifest.layouts]
        """By layout; None where no kernel serves."""

    def few(self, layout: int, tokens: int) -> bool:
        """Whether an expert of this layout is multiplied packed for so many tokens."""
        return tokens <= PACKED_TOKENS and None not in self._gemvs[layout]

    def compute(self, module: Any, works: Sequence[Work]) -> None:
        """Fill every result; `few` holds of all."""
        halves: list[list[Product]] = [[], []]
        shared: dict[tuple[int, int], CpuVectors] = {}  # one token's experts read the same row
        for work in works:
            gate_up, key = self._gemvs[work.layout][0], (work.x.data_ptr(), work.layout)
            assert gate_up is not None
            if key not in shared:
                shared[key] = gate_up.prepare(work.x)
            halves[0].append(Product(gate_up, work.blob, shared[key], _room(gate_up.matrix.rows, work)))
        self._products.run(halves[0])
        for work, first in zip(works, halves[0], strict=True):
            down = self._gemvs[work.layout][1]
            assert down is not None
            x = down.prepare(module._apply_gate(first.out))
            out = work.out if work.out.dtype == torch.float32 else _room(down.matrix.rows, work)
            halves[1].append(Product(down, work.blob, x, out))
        self._products.run(halves[1])
        for work, second in zip(works, halves[1], strict=True):
            if second.out is not work.out:
                work.out.copy_(second.out)


def _room(rows: int, work: Work) -> Tensor:
    return torch.empty(len(work.x), rows)
