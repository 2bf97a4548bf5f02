"""The expert cache on the device: tables and free buffers that kernels read and write without asking the host.

It follows the rules of `offload.cache`, which the host drives: a copy lands in a free buffer that becomes a slot when
its expert is used, guesses never evict, and the policy is the one of `offload.policy`. Here the decisions are taken by
`kernels/source/cache.cu` in the stream's order, so that a whole decoding step can be one CUDA graph. It knows nothing
of models: expert ids in, places of blobs out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeflow.errors import DeviceError
from moeflow.kernels.copy import COPY_BLOCKS, COPY_THREADS, PIECE
from moeflow.kernels.gemv import MOST_TOKENS
from moeflow.kernels.launcher import Kernel, Launcher
from moeflow.offload.mover import Blobs, Mover
from moeflow.offload.policy import FADING, Rule, growth
from moeflow.offload.pools import Pool, Residents
from moeflow.offload.splits import Split, Splits
from moeflow.offload.traffic import Traffic
from moeflow.schema import Manifest, Plan

__all__ = ["DeviceCache", "Found", "MakeMover"]

MakeMover = Callable[[Sequence[Blobs], int], Mover | None]
"""A mover for layers' blobs and so many copies a layer at most; None where kernels are as fast."""

WARPS = COPY_BLOCKS * COPY_THREADS // 32
LOCAL_BLOCKS = 256  # within the device: two a multiprocessor keep its memory busy
LOCAL_WARPS = LOCAL_BLOCKS * COPY_THREADS // 32
STATE = 8  # integers of a layer; cache.cu's
ALONE = (None, None, None, 0)  # of copy.cu's `copy`: nothing is handed over
UNSHARED = (None, None, None, 0, 0)  # of cache.cu's `lookup`: the link brings all


@dataclass(frozen=True)
class Found:
    """Where a step's experts lie, once their copies have arrived."""

    pool: Tensor
    """uint8 [B, blob bytes]."""
    places: Tensor
    """int32 [n]: each choice's buffer."""
    buffers: Tensor | None
    starts: Tensor | None
    lists: Tensor | None
    """For several tokens: the distinct experts' buffers, and which choices each serves."""
    split: Split | None
    """Of one token: what is computed where, if the CPU has a share."""


class DeviceCache:
    """Serves experts from slots and starts the copies of what is missing.

    Args:
        manifest: the packed model.
        plan: slots per layer, landing buffers, policy and guesses.
        launcher: runs the kernels.
        sources: address of each layer's first blob in page-locked memory, as the device sees it.
        device: where the slots are.
        mover: makes what has large copies brought by the copy engine; None leaves them all to kernels.
        splits: leave a part of what a token misses to the CPU; then kernels make all copies.
    """

    def __init__(
        self, manifest: Manifest, plan: Plan, launcher: Launcher, sources: Sequence[int], device: torch.device,
        mover: MakeMover | None = None, splits: Splits | None = None,
    ):  # fmt: skip
        self.splits = splits
        self._manifest = manifest
        self._launcher = launcher
        self._sources = sources
        self.device = device
        self._rule = Rule(plan.policy, plan.half_life, plan.hot_experts)
        layers, experts = len(manifest.layers), max(layer.experts for layer in manifest.layers)
        self.guesses = plan.prefetch.experts if plan.prefetch.depth and plan.strategy == "full" else 0
        room = plan.staging_slots - self.guesses
        self.most_choices = room if room < experts else MOST_TOKENS * experts
        """Choices that one step may make: so many experts at most land without touching what the step still reads."""
        counts = dict.fromkeys(range(len(manifest.layouts)), plan.staging_slots)
        for entry, slots in zip(manifest.layers, plan.cache_slots, strict=True):
            counts[entry.layout] += slots
        self._classes = {i: Pool(n, manifest.layouts[i].nbytes, device) for i, n in counts.items()}
        self._quotas = plan.cache_slots

        def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        most = max(1, min(room, experts))
        self._buffers = table(layers, experts)
        self._stamps = table(layers, experts)
        self._counts = table(layers, experts + 2, dtype=torch.float64)  # behind them, what uses weigh
        self._scores: list[Tensor | None] = [None] * layers  # float32 [E], of the policy learned
        self._state = table(layers, STATE)
        self._jobs = table(layers, most, 3)
        self._job_count = table(layers)
        self._guesses = table(layers, max(1, self.guesses), 2)
        self._stop = table(layers)
        self._progress = table(layers, max(1, self.guesses), WARPS)
        self._uses = table(layers, 4, dtype=torch.int64)  # hits, misses, guesses made, guesses used
        self._bytes = table(layers, 3, dtype=torch.int64)  # missed, guessed, guessed and used
        self._unseen = table(4, dtype=torch.int64)  # where warming counts
        self._warm_jobs, self._warm_count, self._warm_places = table(experts, 3), table(1), table(experts)
        self._warm_progress = table(max(1, self.guesses), LOCAL_WARPS)  # none: whole blobs are copied
        # What warming asks for, where the kernel reads it itself: a copy would wait behind those of whole layers.
        self._asked = torch.zeros(layers, experts, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._experts = experts
        self._gate_up_pieces = [self._split(i) for i in range(layers)]
        self.mover: Mover | None = None
        self.alone: str | None = None
        """Why there is no mover although there was to be one."""
        try:
            scarce = any(n < entry.experts for n, entry in zip(plan.cache_slots, manifest.layers, strict=True))
            feeds = mover and scarce and splits is None  # beside the CPU the link is no longer what all wait for
            self.mover = mover([self._blobs(i) for i in range(layers)], most) if mover and feeds else None
        except DeviceError as error:
            self.alone = f"kernels copy what the copy engine could, a tenth slower: {error}"
        if self.mover:
            weakref.finalize(self, self.mover.close)
        self.reset()

    def _split(self, layer: int) -> int:
        """Pieces of the blob that hold gate and up; the rest is down."""
        down = self._manifest.layout_of(layer).matrices[1]
        return -(-min(s.offset for s in down.segments) // PIECE)

    def _blobs(self, layer: int) -> Blobs:
        memory = self._pool(layer).memory
        return Blobs(self._sources[layer], memory.data_ptr(), memory.shape[1], self._gate_up_pieces[layer])

    def reset(self) -> None:
        """Start with a cold cache; nothing may be under way."""
        if self.mover:
            self.mover.reset()
        if self.splits:
            self.splits.reset()
        self._buffers.fill_(-1)
        self._guesses.fill_(-1)
        for table in (self._stamps, self._counts, self._state, self._progress):
            table.zero_()
        self._state[:, 1] = torch.tensor(self._quotas, dtype=torch.int32)
        pair = (1.0 - FADING, FADING) if self._rule.name == "learned" else (1.0, growth(self._rule.half_life))
        self._counts[:, -2:] = torch.tensor(pair, dtype=torch.float64)
        for layer, hot in enumerate(self._rule.hot):
            self._stamps[layer, list(hot)] = 1
        self._stop.fill_(1)
        for pool in self._classes.values():
            pool.reset()

    def forget(self) -> None:
        """Start counting anew."""
        self._uses.zero_()
        self._bytes.zero_()
        if self.splits:
            self.splits.computed.zero_()

    # -- one step of one layer ----------------------------------------------------------------------------

    def find(self, layer: int, chosen: Tensor, tokens: int) -> Found:
        """Look up `chosen` [T, K] and decide on copies. All that follows is ordered behind it."""
        count = chosen.numel()
        assert count <= max(1, self.most_choices), "more choices than landing buffers"
        places = torch.empty(count, dtype=torch.int32, device=self.device)
        lists: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if tokens > 1:
            buffers, starts, order = (
                torch.empty(n, dtype=torch.int32, device=self.device) for n in (count, count + 1, count)
            )
            lists = (buffers.zero_(), starts, order)  # buffers beyond the distinct ones are never read
        jobs, job_count = self._jobs[layer], self._job_count[layer : layer + 1]
        splits = self.splits if tokens == 1 else None
        self._lookup(layer, chosen.reshape(-1), self._uses[layer], jobs, job_count, places, *lists, splits=splits)
        return Found(self._pool(layer).memory, places, *lists, splits.split(count) if splits else None)

    def _lookup(
        self, layer: int, chosen: Tensor, uses: Tensor, jobs: Tensor, job_count: Tensor, places: Tensor,
        *lists: Tensor | None, splits: Splits | None = None,
    ) -> None:  # fmt: skip
        pool = self._pool(layer)
        shared = splits.lookup_arguments(layer) if splits else UNSHARED
        self._kernel("cache.cu", "lookup")(
            1, 32, chosen, chosen.numel(), self._buffers[layer], self._stamps[layer], self._counts[layer],
            self._state[layer], uses, pool.ring, pool.state, len(pool.ring), self._guesses[layer],
            self._stop[layer : layer + 1], jobs, job_count, places, *lists, self._scores[layer], *shared,
        )  # fmt: skip

    def judge(self, layer: int, scores: Tensor) -> None:
        """How soon each expert [E] of a layer will be used again, the greater the sooner; before `find` and `warm`."""
        self._scores[layer] = scores  # read where it lies: a copy would be one more launch

    def copy(self, layer: int, half: int, shared: bool = False) -> None:
        """Copy gate and up (`half` 0) or down (1, right behind 0) of what `find` missed, in the current stream.

        `shared`: as far as it is not the CPU's.
        """
        pool = self._pool(layer)
        split, pieces = self._gate_up_pieces[layer], pool.memory.shape[1] // PIECE
        first, last = (0, split) if half == 0 else (split, pieces)
        if shared and self.splits:
            self.splits.copy(
                layer, half, pool.memory, self._jobs[layer], self._job_count[layer : layer + 1], self._progress[layer],
                (first, last), self._bytes[layer], self._defines(follows=half),
            )  # fmt: skip
            return
        mover = self.mover
        if mover and half == 0:
            self._hand_over(mover, layer, split, pieces)
        handed = (mover.shares, mover.desk, mover.post, mover.patience) if mover else ALONE
        self._kernel("copy.cu", "copy", follows=half)(
            (COPY_BLOCKS, 1, 1), COPY_THREADS, self._sources[layer], pool.memory, pool.memory.shape[1],
            self._jobs[layer], self._job_count[layer : layer + 1], self._progress[layer], first, last,
            self._bytes[layer], *handed,
        )  # fmt: skip

    def _hand_over(self, mover: Mover, layer: int, split: int, pieces: int) -> None:
        """Let the copy engine have its share of the layer's copies."""
        ends = int(layer == len(self._gate_up_pieces) - 1)
        self._kernel("hand_over.cu", "hand_over")(
            1, 32, self._jobs[layer], self._job_count[layer : layer + 1], self._progress[layer], self._buffers[layer],
            split, pieces, layer, ends, mover.head, mover.least, mover.desk, mover.shares, mover.post, mover.opened,
            self._bytes[layer],
        )  # fmt: skip

    def guess(self, layer: int, ids: Tensor) -> None:
        """Choose buffers for guessed experts [n], likeliest first, of a layer whose turn comes next."""
        pool = self._pool(layer)
        self._kernel("cache.cu", "guess")(
            1, 32, ids, ids.numel(), self._buffers[layer], self._state[layer], self._uses[layer], pool.ring, pool.state,
            len(pool.ring), self._guesses[layer], self._stop[layer : layer + 1], self._progress[layer],
        )  # fmt: skip

    def copy_guesses(self, layer: int) -> None:
        """Copy them until `find` is called for their layer."""
        pool = self._pool(layer)
        self._kernel("copy.cu", "copy_guesses")(
            (COPY_BLOCKS, 1, 1), COPY_THREADS, self._sources[layer], pool.memory, pool.memory.shape[1],
            self._guesses[layer], self._progress[layer], self._stop[layer : layer + 1],
            pool.memory.shape[1] // PIECE, self._bytes[layer],
        )  # fmt: skip

    # -- beside the steps: what the host may ask, at the price of waiting for the device -----------------------

    def resident(self, layer: int) -> Mapping[int, Tensor]:
        """The cached experts of a layer and their blobs; valid until the layer's next `find`."""
        return self.residents()[layer]

    def residents(self) -> list[Mapping[int, Tensor]]:
        """`resident` of every layer, read back at once."""
        tables = enumerate(self._buffers.tolist())
        return [Residents(self._pool(i).memory, {e: b for e, b in enumerate(table) if b >= 0}) for i, table in tables]

    def warm(self, layer: int, recent: Sequence[tuple[int, Tensor]]) -> None:
        """After prefill: keep the experts used last.

        One lookup for all of them, so those that are cached are touched before any other is admitted, and the others
        follow by id; one copy of what lies elsewhere on the device.

        Args:
            layer: whose blobs in the cache and elsewhere nobody may write before this was carried out.
            recent: experts and their blobs, last used last; those outside the cache all in one buffer of the layer.
        """
        kept = recent[-self._quotas[layer] :] if self._quotas[layer] else ()
        if not kept:
            return
        # The row may be written: since the pass began, at the latest, the host has waited for whoever read it.
        asked = self._asked[layer, : len(kept)]
        asked.copy_(torch.tensor([expert for expert, _ in kept]))
        places = self._warm_places[: len(kept)]
        self._lookup(layer, asked, self._unseen, self._warm_jobs, self._warm_count, places, None, None, None)
        memory = self._pool(layer).memory
        slots = range(memory.data_ptr(), memory.data_ptr() + memory.nbytes)
        sources = {blob.data_ptr() - e * blob.nbytes for e, blob in kept if blob.data_ptr() not in slots}
        assert len(sources) <= 1, "blobs outside the cache lie in one buffer"
        for source in sources:
            self._kernel("copy.cu", "copy", LOCAL_WARPS)(
                LOCAL_BLOCKS, COPY_THREADS, source, memory, memory.shape[1], self._warm_jobs, self._warm_count,
                self._warm_progress, 0, memory.shape[1] // PIECE, self._unseen, *ALONE,
            )  # fmt: skip

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is looked up and copied inside leaves no trace in the counts."""
        tables = [self._uses, self._bytes, *([self.splits.computed] if self.splits else [])]
        before = [table.clone() for table in tables]
        try:
            yield
        finally:
            for table, values in zip(tables, before, strict=True):
                table.copy_(values)

    def count(self, traffic: Traffic) -> Traffic:
        """`traffic` with what the device has counted since the start in place of its own figures."""
        hits, misses, guesses, used = self._uses.sum(0).tolist()
        missed, guessed, _ = self._bytes.sum(0).tolist()
        computed = int(self.splits.computed.sum()) if self.splits else 0
        return replace(
            traffic, hits=hits, misses=misses, guesses=guesses, guesses_used=used, missed_bytes=missed,
            guessed_bytes=guessed, computed_bytes=computed,
        )  # fmt: skip

    @property
    def wasted_bytes(self) -> int:
        """Copied on guesses that were not used."""
        _, guessed, used = self._bytes.sum(0).tolist()
        return int(guessed - used)

    def _pool(self, layer: int) -> Pool:
        return self._classes[self._manifest.layers[layer].layout]

    def _kernel(self, source: str, name: str, warps: int = WARPS, follows: int = 0) -> Kernel:
        return self._launcher.kernel(source, name, self._defines(warps, follows))

    def _defines(self, warps: int = WARPS, follows: int = 0) -> dict[str, int | str]:
        policy = self._rule.name
        lfu = int(policy == "lfu")
        defines: dict[str, int | str] = {
            "EXPERTS": self._experts,
            "GUESSES": max(1, self.guesses),
            "WARPS": warps,
            "LFU": lfu,
        }
        if self.splits:
            defines["SHARED"] = 1
        if policy in ("mix", "static", "learned"):
            defines[policy.upper()] = 1
        if follows:
            defines["FOLLOWS"] = 1
        return defines
