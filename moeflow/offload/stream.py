"""Whole layers through two buffers: for prefill, where nearly every expert is needed, and for the naive strategy.

While a layer computes, the next one's experts are on their way. A layer may be begun as soon as the layer before last
has been taken: whoever begins it then, and not when its turn comes, keeps the link busy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moeflow.offload.link import Link, Ticket
from moeflow.offload.traffic import Traffic
from moeflow.schema import Manifest

__all__ = ["LayerStream"]


class LayerStream:
    """Two buffers, each of which holds all experts of any one layer, blob after blob as in its shard."""

    def __init__(self, manifest: Manifest, link: Link, device: torch.device, traffic: Traffic):
        self._starts = [manifest.starts(layer) for layer in range(len(manifest.layers))]
        self._link = link
        self._traffic = traffic
        nbytes = max(starts[-1] for starts in self._starts)
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._begun: list[tuple[int | None, dict[int, Ticket]]] = [(None, {}), (None, {})]  # layer, expert -> copy

    def begin(self, layer: int, skip: Mapping[int, Tensor]) -> None:
        """Start copying the layer's experts, but those in `skip` and those under way already."""
        held, tickets = self._begun[layer % 2]
        if held != layer:
            for ticket in tickets.values():  # copies that nobody needed may still be on their way to this buffer
                ticket.settle()
            tickets = {}
            self._begun[layer % 2] = (layer, tickets)
        starts = self._starts[layer]
        missing = [expert for expert in range(len(starts) - 1) if expert not in skip and expert not in tickets]
        tickets.update(self._link.fetch_many(layer, missing, self._buffers[layer % 2]))
        self._traffic.streamed_bytes += sum(starts[expert + 1] - starts[expert] for expert in missing)

    def blob(self, layer: int, expert: int) -> Tensor:
        """Where an expert of `layer` lies in its buffer."""
        starts = self._starts[layer]
        return self._buffers[layer % 2][starts[expert] : starts[expert + 1]]

    def take(self, layer: int, needed: Sequence[int], cached: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield every needed expert with its blob: those of `cached` first, then from the buffer as they arrive.

        After this the layer's buffer belongs to the layer after next.
        """
        self.begin(layer, cached)
        _, tickets = self._begun[layer % 2]
        for expert in needed:
            if expert not in tickets:
                yield expert, cached[expert]
        for expert in needed:
            if expert in tickets:
                tickets[expert].wait()
                yield expert, self.blob(layer, expert)
        self._begun[layer % 2] = (None, tickets)

    def reset(self) -> None:
        """Forget what was begun; no copy may be under way."""
        self._begun = [(None, {}), (None, {})]
