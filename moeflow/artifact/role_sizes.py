"""An artifact's bytes by what they are: experts, attention, shared experts, output head, and the rest.

From names and shapes, so that it can be said before anything is packed. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from moeflow.artifact.blueprint import Blueprint
from moeflow.schema import DenseScheme, Scheme

__all__ = ["OTHER", "RoleSize", "role_sizes"]

OTHER = "embeddings, norms, routers"


@dataclass(frozen=True)
class RoleSize:
    """One kind of matrices under one scheme."""

    role: str
    scheme: Scheme
    weights: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits a weight, with scales, zeros and padding."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        sizes = {"weights": self.weights, "nbytes": self.nbytes, "bits": round(self.bits, 4)}
        return {"role": self.role, "scheme": self.scheme.label, **sizes}


def role_sizes(blueprint: Blueprint) -> tuple[RoleSize, ...]:
    """Every kind under every scheme that it has; together all data of the artifact."""
    found: dict[tuple[str, Scheme], tuple[int, int]] = {}
    for role, scheme, weights, nbytes in _pieces(blueprint):
        before = found.get((role, scheme), (0, 0))
        found[role, scheme] = before[0] + weights, before[1] + nbytes
    return tuple(RoleSize(role, scheme, *size) for (role, scheme), size in found.items())


def _pieces(blueprint: Blueprint) -> Iterator[tuple[str, Scheme, int, int]]:
    """Role, scheme, weights and bytes of each layer's experts, then of each resident tensor."""
    checkpoint = blueprint.checkpoint
    for position in range(len(checkpoint.layers)):
        for number, count in Counter(blueprint.numbers[position]).items():
            layout = blueprint.layouts[number]
            weights = sum(matrix.rows * matrix.columns for matrix in layout.matrices)
            yield "experts", layout.matrices[0].scheme, count * weights, count * layout.nbytes
    others = []
    for name, stored in checkpoint.resident.items():
        role, info = checkpoint.family.resident_role(name), checkpoint.tensors[stored]
        if matrix := blueprint.resident.get(name):
            yield matrix.role.replace("_", " "), matrix.scheme, matrix.rows * matrix.columns, matrix.nbytes
        elif role:
            yield role.replace("_", " "), DenseScheme(), prod(info.shape), info.nbytes
        else:
            others.append((OTHER, DenseScheme(), prod(info.shape), info.nbytes))
    yield from others
