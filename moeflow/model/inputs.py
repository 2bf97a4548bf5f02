"""What several packed products of a step share: an input laid out once, and products that can be made as one.

Query, key and value projections read the same tensor one after another; so do the norm before them and they. Who reads
what is learned from a pass and not from names: `Inputs` sees which products are asked for the same tensor in turn. From
then on a norm lays its rows out for the product that follows it, and layers that share an input are multiplied in one
launch (`linear.merge`). After `freeze`, when a graph holds addresses, nothing is rearranged any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeflow.kernels.gemv import Gemv, Prepared

if TYPE_CHECKING:
    from moeflow.model.linear import PackedLinear

__all__ = ["Inputs"]

KEPT = 4  # inputs: norms of query and key come between the projections of one


@dataclass
class _Input:
    """A tensor that products read."""

    tensor: weakref.ref[Tensor]
    place: tuple[int, int]
    """Address and size: a view of all of it is the same input."""
    maker: Hashable = None
    """The norm that gave it."""
    prepared: dict[object, Prepared] = field(default_factory=dict)
    readers: list[weakref.ref[PackedLinear]] = field(default_factory=list)

    def is_in(self, x: Tensor) -> bool:
        alive = self.tensor()
        return alive is not None and (x is alive or self.place == _place(x))


class Inputs:
    """The inputs that were asked for last, and what is known about who asks; one per model."""

    def __init__(self) -> None:
        self._recent: list[_Input] = []
        self._wanted: dict[Hashable, Gemv] = {}
        self._families: list[list[weakref.ref[PackedLinear]]] = []
        self._lists: dict[int, tuple[Tensor, Tensor]] = {}
        self.frozen = False
        """Whether a graph holds what was arranged."""

    def wanted(self, maker: Hashable) -> Gemv | None:
        """The product that reads what this norm gives, as far as is known."""
        return self._wanted.get(maker)

    def offer(self, x: Tensor, maker: Hashable, gemv: Gemv | None = None, prepared: Prepared | None = None) -> None:
        """Take note of a norm's result [.., K], and of its layout for `gemv`."""
        entry = self._add(x)
        entry.maker = maker
        if gemv is not None and prepared is not None:
            entry.prepared[gemv.layout] = prepared

    def prepare(self, gemv: Gemv, x: Tensor, reader: PackedLinear | None = None) -> Prepared:
        """x [.., K] laid out for `gemv`."""
        entry = next((e for e in self._recent if e.is_in(x)), None) or self._add(x)
        if reader is not None and not self.frozen:
            entry.readers.append(weakref.ref(reader))
        found = entry.prepared.get(gemv.layout)
        if found is None:
            found = entry.prepared[gemv.layout] = gemv.prepare(x.reshape(-1, x.shape[-1]).contiguous())
            if entry.maker is not None and not self.frozen:
                self._wanted.setdefault(entry.maker, gemv)
        return found

    def _add(self, x: Tensor) -> _Input:
        entry = _Input(weakref.ref(x), _place(x))
        self._recent.append(entry)
        if len(self._recent) > KEPT:
            self._close(self._recent.pop(0))
        return entry

    def _close(self, entry: _Input) -> None:
        if len(entry.readers) > 1:
            self._families.append(entry.readers)

    def forget(self) -> None:
        """Let go of all inputs."""
        for entry in self._recent:
            self._close(entry)
        self._recent = []

    def families(self) -> list[list[PackedLinear]]:
        """Layers that were given the same input since the last call, in their order, each in one family at most."""
        self.forget()
        found: list[list[PackedLinear]] = []
        seen: set[int] = set()
        for references in self._families:
            members = [member for reference in references if (member := reference()) is not None]
            own = {id(member) for member in members}
            if len(own) == len(members) == len(references) and not seen & own:
                seen |= own
                found.append(members)
        self._families = []
        return found

    def freeze(self) -> None:
        """Learn nothing more."""
        self.forget()
        self._families, self.frozen = [], True

    def lists(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """One job for so many vectors, as `Jobs` wants it."""
        if tokens not in self._lists:
            order = torch.arange(tokens, dtype=torch.int32, device=device)
            self._lists[tokens] = torch.tensor([0, tokens], dtype=torch.int32, device=device), order
        return self._lists[tokens]


def _place(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.numel()
