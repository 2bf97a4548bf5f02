"""The expert cache: k slots per layer, and buffers in which copies land.

Every copy, on demand or on a guess, lands in a free buffer. When its expert is used, the buffer becomes a slot
of the layer, and the buffer of whoever the policy evicts becomes free: nothing is copied twice, a guess never
evicts a cached expert (paper, section 3.2), and two experts of one step cannot evict each other before both
were computed. Experts that were guessed and not used stay until their buffer is needed.

A layer's buffers have the size of its largest blob, so that any of them may take any expert's; a smaller one is copied
at its own size and leaves the rest of its buffer as it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeflow.errors import MoeflowError
from moeflow.offload.link import Link, Ticket
from moeflow.offload.policy import CachePolicy, LearnedPolicy, Rule
from moeflow.offload.traffic import Traffic
from moeflow.schema import ExpertLayer, Manifest, Plan

__all__ = ["ExpertCache"]


class _Pool:
    """Buffers of one size on the device."""

    def __init__(self, count: int, nbytes: int, device: torch.device):
        self.memory = torch.empty(count, nbytes, dtype=torch.uint8, device=device)  # [buffers, blob bytes]
        self.reset()

    def reset(self) -> None:
        self.free = deque(range(len(self.memory)))


@dataclass
class _Landing:
    """A copy that was started and whose expert has not been used yet."""

    buffer: int
    ticket: Ticket


@dataclass
class _Layer:
    policy: CachePolicy
    pool: _Pool
    sizes: Sequence[int]
    """Of each expert's blob."""
    slots: dict[int, int] = field(default_factory=dict)
    """Expert -> buffer, of the experts that the policy keeps."""
    landings: dict[int, _Landing] = field(default_factory=dict)

    def blob(self, expert: int, buffer: int) -> Tensor:
        """The place of an expert's blob in a buffer."""
        return self.pool.memory[buffer, : self.sizes[expert]]


class ExpertCache:
    """Serves experts from slots, and fetches what is missing."""

    def __init__(self, manifest: Manifest, plan: Plan, link: Link, device: torch.device, traffic: Traffic):
        self._link = link
        self._rule = Rule(plan.policy, plan.half_life, plan.hot_experts)
        self._traffic = traffic
        self._guesses: dict[tuple[int, int], int] = {}  # (layer, expert) not used yet -> step, oldest first
        self._step = 0
        slots = dict.fromkeys((entry.layout for entry in manifest.layers), plan.staging_slots)
        for entry, count in zip(manifest.layers, plan.cache_slots, strict=True):
            slots[entry.layout] += count
        pools = {i: _Pool(count, manifest.layouts[i].nbytes, device) for i, count in slots.items()}
        self._layers = [
            _Layer(self._rule.make(i, count), pools[entry.layout], _sizes(manifest, entry))
            for i, (entry, count) in enumerate(zip(manifest.layers, plan.cache_slots, strict=True))
        ]

    def fetch(
        self, layer: int, needed: Sequence[int], guesses: Iterable[tuple[int, int]] = ()
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield every needed expert once with its blob on the device; resident ones come first.

        The blob is valid until the iterator is advanced. The iterator must be exhausted.

        Args:
            layer: position among the MoE layers.
            needed: distinct expert ids.
            guesses: `(layer, expert)` to fetch once all that is needed is under way.
        """
        self._step += 1
        state = self._layers[layer]
        hits = [e for e in needed if e in state.slots]
        landed = [e for e in needed if e in state.landings]
        waiting = deque(e for e in needed if e not in state.slots and e not in state.landings)
        self._traffic.hits += len(hits)
        self._traffic.guesses_used += len(landed)
        self._traffic.misses += len(waiting)
        arriving = deque(landed)
        for expert in landed:
            del self._guesses[layer, expert]  # from now on nobody may take its buffer
        pending = deque(guesses)
        self._start(layer, waiting, arriving)
        if not waiting:
            self._start_guesses(pending)
        for expert in hits:
            state.policy.touch(expert)
            yield expert, state.blob(expert, state.slots[expert])
        while arriving:
            expert = arriving.popleft()
            landing = state.landings[expert]
            self._wait(layer, expert, landing, guessed=expert in landed)
            yield expert, state.blob(expert, landing.buffer)
            del state.landings[expert]
            self._keep(state, expert, landing.buffer)
            self._start(layer, waiting, arriving)
            if not waiting:
                self._start_guesses(pending)
        assert not waiting, "there is at least one landing buffer"

    def judge(self, layer: int, scores: Sequence[float]) -> None:
        """How soon each expert of a layer will be used again, the greater the sooner; before `fetch` and `warm`."""
        policy = self._layers[layer].policy
        if isinstance(policy, LearnedPolicy):
            policy.judge(scores)

    def reset(self) -> None:
        """Forget everything, after a pass that was abandoned midway; no copy may be under way."""
        self._guesses.clear()
        for layer, state in enumerate(self._layers):
            state.policy = self._rule.make(layer, state.policy.capacity)
            state.slots.clear()
            state.landings.clear()
            state.pool.reset()

    def resident(self, layer: int) -> dict[int, Tensor]:
        """The cached experts of a layer and their blobs."""
        state = self._layers[layer]
        return {expert: state.blob(expert, buffer) for expert, buffer in state.slots.items()}

    def residents(self) -> list[dict[int, Tensor]]:
        """`resident` of every layer; each holds until the layer's next use."""
        return [self.resident(layer) for layer in range(len(self._layers))]

    def warm(self, layer: int, recent: Sequence[tuple[int, Tensor]]) -> None:
        """After prefill: keep the experts used last (last one last), copying blobs that lie elsewhere on the device.

        Those that are cached are touched before any other is admitted, and never copied: once evicted, their blob,
        which lies in their slot, may be overwritten.
        """
        state = self._layers[layer]
        cached = [expert for expert, _ in recent if expert in state.slots]
        for expert in cached:
            state.policy.touch(expert)
        for expert, blob in recent:
            if state.policy.capacity and expert not in cached and expert not in state.landings and state.pool.free:
                buffer = state.pool.free.popleft()
                state.blob(expert, buffer).copy_(blob)
                self._keep(state, expert, buffer)

    def _wait(self, layer: int, expert: int, landing: _Landing, guessed: bool) -> None:
        """Until the expert is there; a guess that could not be read is a miss, not an error of a step long past."""
        try:
            landing.ticket.wait()
        except MoeflowError:
            if not guessed:
                raise
            target = self._layers[layer].blob(expert, landing.buffer)
            landing.ticket = self._link.fetch(layer, expert, target)
            landing.ticket.wait()

    def _keep(self, state: _Layer, expert: int, buffer: int) -> None:
        state.slots[expert] = buffer
        victim = state.policy.admit(expert)
        if victim is not None:
            state.pool.free.append(state.slots.pop(victim))

    def _start(self, layer: int, waiting: deque[int], arriving: deque[int]) -> None:
        """Start copies for as many waiting experts as there are buffers."""
        state = self._layers[layer]
        while waiting and (buffer := self._take(state)) is not None:
            expert = waiting.popleft()
            ticket = self._link.fetch(layer, expert, state.blob(expert, buffer))
            state.landings[expert] = _Landing(buffer, ticket)
            arriving.append(expert)
            self._traffic.missed_bytes += state.sizes[expert]

    def _start_guesses(self, pending: deque[tuple[int, int]]) -> None:
        """Start copies on guesses for as many as there are buffers; the others stay pending.

        A guess may take the buffer of an older one, but not of its own step: those are likelier, they come first.
        """
        while pending:
            layer, expert = pending[0]
            state = self._layers[layer]
            if expert not in state.slots and expert not in state.landings:
                buffer = self._take(state, older_than=self._step)
                if buffer is None:
                    return
                ticket = self._link.fetch(layer, expert, state.blob(expert, buffer))
                state.landings[expert] = _Landing(buffer, ticket)
                self._guesses[layer, expert] = self._step
                self._traffic.guesses += 1
                self._traffic.guessed_bytes += state.sizes[expert]
            pending.popleft()

    def _take(self, state: _Layer, older_than: int | None = None) -> int | None:
        """A free buffer, if need be that of the oldest guess that nobody used (and that is from an older step)."""
        if state.pool.free:
            return state.pool.free.popleft()
        for (layer, expert), step in self._guesses.items():
            if older_than is not None and step >= older_than:
                return None
            if self._layers[layer].pool is state.pool:
                landing = self._layers[layer].landings.pop(expert)
                landing.ticket.settle()
                del self._guesses[layer, expert]
                return landing.buffer
        return None


def _sizes(manifest: Manifest, entry: ExpertLayer) -> list[int]:
    return [manifest.layouts[entry.layout_of(expert)].nbytes for expert in range(entry.experts)]
