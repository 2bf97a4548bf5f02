"""Sums over a text from which linear maps follow: of hidden states with themselves, and with what routers then chose.

They are all that least squares needs, so a text of any length is read once and nothing of it is kept: no token, no
hidden state. A recorder of passes (`moeflow.model.recorder`); it solves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Gate", "TAIL", "Moments", "coming", "uses"]

Gate = Callable[[Tensor], Tensor]
ALIKE = 0.98
"""Of its choices, a router is taken to choose by numbers that give so many."""

TAIL = 16
"""Tokens at the end of each pass that are left out: what comes after them is not seen, and 0.7^16 of it would count."""


def uses(index: Tensor, experts: int) -> Tensor:
    """Expert ids [T, K] as float32 [T, E]: 1 where a token uses an expert."""
    return torch.zeros(index.shape[0], experts, device=index.device).scatter_(1, index.to(torch.int64), 1.0)


class Moments:
    """Of every MoE layer.

    Args:
        experts: per layer.
        hidden: width of the hidden states.
        depth: layers ahead that are guessed.
        reuse: how much less a use one token later counts.
        device: where sums are kept.
        gates: per layer, what turns its hidden states [T, H] into numbers [T, E] of which its router takes the
            greatest; None where that is not known. Such numbers say more than the choice made of them: from them the
            mid-size models' maps recall 0.88 of the next layer's experts, from the choice 0.84.
    """

    def __init__(
        self,
        experts: Sequence[int],
        hidden: int,
        depth: int,
        reuse: float,
        device: torch.device,
        gates: Sequence[Gate | None] = (),
    ):
        self.experts, self.depth, self.reuse, self.device = experts, depth, reuse, device
        self._gates = list(gates) or [None] * len(experts)
        self._seen: set[int] = set()
        self.tokens = 0

        def sums(columns: int) -> Tensor:
            return torch.zeros(hidden + 1, columns, device=device)

        self.states = [sums(hidden + 1) for _ in experts]  # [H + 1, H + 1], the last of a one
        self.keep = [sums(count) for count in experts]  # [H + 1, E]
        self.guess = [
            [sums(count) if layer >= ahead else None for layer, count in enumerate(experts)]
            for ahead in range(1, depth + 1)
        ]
        self._recent: dict[int, Tensor] = {}  # hidden states of the last layers

    def note(self, layer: int, hidden_states: Tensor, index: Tensor, _weights: Tensor) -> None:
        """As `Recorder.note`; passes of at most `TAIL` tokens count for nothing."""
        whole, rows = index.shape[0], index.shape[0] - TAIL
        if rows <= 0:
            return
        used = uses(index.to(self.device), self.experts[layer])
        states = hidden_states[:rows].to(self.device, torch.float32)
        states = torch.cat([states, states.new_ones(rows, 1)], dim=1)  # [rows, H + 1]
        self.states[layer].addmm_(states.T, states)
        self.keep[layer].addmm_(states.T, coming(whole, self.reuse, self.device)[:rows] @ used)
        self._recent[layer] = states
        wanted = self._wanted(layer, hidden_states, used)[:rows]
        for ahead, sums in enumerate(self.guess, start=1):
            target = sums[layer]
            if target is not None:
                target.addmm_(self._recent[layer - ahead].T, wanted)
        self._recent.pop(layer - self.depth, None)

    def _wanted(self, layer: int, hidden_states: Tensor, used: Tensor) -> Tensor:
        """What a guess of this layer shall say [T, E]: the router's numbers, if it does choose by them."""
        gate = self._gates[layer]
        if gate is None:
            return used
        numbers = gate(hidden_states).to(self.device, torch.float32)
        if layer not in self._seen:
            self._seen.add(layer)
            chosen = uses(numbers.topk(int(used[0].sum()), dim=1).indices, used.shape[1])
            if float((chosen * used).sum() / used.sum()) < ALIKE:
                self._gates[layer] = None
                return used
        return numbers

    def end(self, tokens: int) -> None:
        """As `Recorder.end`."""
        self.tokens += max(0, tokens - TAIL)
        self._recent.clear()


def coming(tokens: int, reuse: float, device: torch.device) -> Tensor:
    """[T, T]: what a later token's use counts for an earlier token, 1 - reuse for the next, at most 1 all together."""
    place = torch.arange(tokens, device=device)
    distance = place[None] - place[:, None]
    return torch.where(distance > 0, (1 - reuse) * reuse ** (distance - 1).clamp(min=0).float(), 0.0)
