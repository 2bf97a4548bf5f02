"""The device's cache where the CPU has a share: who is brought whole, in part, or not at all; against plain Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeflow.kernels.copy import PIECE
from moeflow.offload.device import DeviceCache
from moeflow.offload.policy import CachePolicy, LearnedPolicy, Rule
from moeflow.offload.splits import ALONE, CLASSES, HERE, ONE, RATIO, STEP, Splits
from moeflow.offload.traffic import Traffic

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

CPU = torch.device("cpu")
ROW_STEP, NEARLY, HARDLY = 64, ONE * 7 // 8, ONE // 16
ROWS = (256, 192)
# Offset and bytes a row of the arrays of both halves: rows of a fifth of a piece, scales that share pieces with others.
PARTS = (((0, 800), (204800, 80)), ((225280, 640), (348160, 48)))
NBYTES = 357376 // PIECE * PIECE + PIECE


def matrix(half: int) -> Any:
    segments = [SimpleNamespace(offset=at, nbytes=row * ROWS[half]) for at, row in PARTS[half]]
    return SimpleNamespace(rows=ROWS[half], segments=segments, columns=256)


def make(
    experts: int, quota: int, choices: int, guesses: int, policy: str, order: str
) -> tuple[DeviceCache, torch.Tensor]:
    """A cache of one layer that leaves a share to the CPU; the second result is host memory [experts, bytes]."""
    layout: Any = SimpleNamespace(nbytes=NBYTES, matrices=(matrix(0), matrix(1)))
    manifest: Any = SimpleNamespace(
        layers=[SimpleNamespace(experts=experts, layout=0)], layouts=[layout], layout_of=lambda _: layout,
        model=SimpleNamespace(top_k=choices),
    )  # fmt: skip
    plan: Any = SimpleNamespace(
        policy=policy, half_life=6, hot_experts=(tuple(range(1, 2 * quota, 2)),) if policy == "static" else (),
        strategy="full", cache_slots=(quota,), staging_slots=choices + guesses,
        prefetch=SimpleNamespace(depth=int(guesses > 0), experts=guesses),
    )  # fmt: skip
    host = torch.randint(256, (experts, NBYTES), dtype=torch.uint8)
    launcher = emulator.EmulatedLauncher(order, seed=random.randrange(1 << 30))
    splits = Splits(manifest, launcher, [host.data_ptr()], CPU, 0.5, fixed=True)
    return DeviceCache(manifest, plan, launcher, [host.data_ptr()], CPU, None, splits), host


def split(ratio: Sequence[int], missing: int) -> tuple[int, list[int]]:
    """Experts that the link brings whole, and of the next one the rows of either half: as the C++ has it, in Python."""
    share = [r * missing for r in ratio]
    whole, rest = divmod((2 * share[0] + share[1]) // 3, ONE)
    parts = [0, 0]
    if rest >= NEARLY:
        whole += 1
    elif rest >= HARDLY:
        parts = [min(max(s - whole * ONE, 0), ONE) for s in share]
    return min(whole, missing), [r * p // ONE // ROW_STEP * ROW_STEP for r, p in zip(ROWS, parts, strict=True)]


class Oracle:
    """A policy that is told who came in whole."""

    def __init__(self, policy: CachePolicy):
        self.policy, self.hits, self.used, self.misses = policy, 0, 0, 0

    def step(
        self, needed: Sequence[int], guessed: Sequence[int], ratios: Sequence[Sequence[int]]
    ) -> dict[int, list[int]]:
        """Rows of both halves of each needed expert that the device computes."""
        wanted = sorted(needed)
        hits = [e for e in wanted if e in self.policy]
        landed = [e for e in wanted if e not in self.policy and e in guessed]
        missing = [e for e in wanted if e not in self.policy and e not in guessed]
        for expert in hits:
            self.policy.touch(expert)
        missing.sort(key=lambda e: (-self.policy.wish(e), e))
        landed.sort(key=guessed.index)
        missing = landed + missing
        here = {e: list(ROWS) for e in wanted}
        whole, rows = len(missing), [0, 0]
        if missing:
            whole, rows = split(ratios[min(len(missing), 3) - 1 + 3 * bool(landed)], len(missing))
        for number, expert in enumerate(missing):
            if number < whole:
                self.policy.admit(expert)
            else:
                here[expert] = rows if number == whole else [0, 0]
                self.policy.see(expert)
        used = sum(1 for e in landed if any(here[e]))
        self.hits, self.used, self.misses = self.hits + len(hits), self.used + used, self.misses + len(missing) - used
        return here


def assert_brought(blob: torch.Tensor, source: torch.Tensor, rows: Sequence[int]) -> None:
    """The first rows of every array are there."""
    for half in (0, 1):
        for at, nbytes in PARTS[half]:
            here = slice(at, at + nbytes * rows[half])
            assert torch.equal(blob[here], source[here])


@pytest.mark.parametrize("policy", ["lru", "lfu", "mix", "static", "learned"])
@pytest.mark.parametrize("shape", [(8, 3, 2, 0), (8, 0, 2, 0), (24, 6, 5, 3)], ids=str)
def test_every_step_is_the_policys(policy: str, shape: tuple[int, int, int, int]) -> None:
    experts, quota, choices, guesses = shape
    order = random.choice(["forward", "reverse", "random"])
    cache, host = make(experts, quota, choices, guesses, policy, order)
    splits = cache.splits
    assert splits is not None
    oracle = Oracle(Rule(policy, 6, (tuple(range(1, 2 * quota, 2)),)).make(0, quota))
    for _ in range(60):
        ratios = torch.randint(0, ONE + 1, (CLASSES, 2), dtype=torch.int32)
        splits.desk[RATIO:] = ratios.flatten()
        guessed: list[int] = []
        if guesses:
            cache.guess(0, torch.tensor(random.sample(range(experts), guesses)))
            cache.copy_guesses(0)
            guessed = [e for e in cache._guesses[0, :, 0].tolist() if e >= 0]
        needed = random.sample(range(experts), choices)
        if isinstance(oracle.policy, LearnedPolicy):
            scores = (3 * torch.randn(experts)).round() / 7
            cache.judge(0, scores)
            oracle.policy.judge(scores.tolist())
        found = cache.find(0, torch.tensor([needed]), 1)
        assert found.split is not None and found.split.experts.tolist() == needed
        cached = {e for e in needed if e in oracle.policy}
        here = oracle.step(needed, guessed, ratios.tolist())
        cache.copy(0, 0, shared=True)
        cache.copy(0, 1, shared=True)
        for place, expert in enumerate(needed):
            rows = [int(found.split.shares[HERE + half, place]) for half in (0, 1)]
            assert rows == here[expert], (expert, needed)
            early = [int(found.split.early(half).end[place]) for half in (0, 1)]  # type: ignore[index]
            assert early == (list(ROWS) if expert in cached else [0, 0])
            if any(rows):
                assert_brought(found.pool[found.places[place]], host[expert], rows)
        kept = cache.resident(0)
        assert set(kept) == {e for e in range(experts) if e in oracle.policy}
        for expert, blob in kept.items():
            assert torch.equal(blob, host[expert])
    traffic = cache.count(Traffic())
    assert (traffic.hits, traffic.guesses_used, traffic.misses) == (oracle.hits, oracle.used, oracle.misses)
    assert 0 < traffic.missed_bytes <= traffic.misses * NBYTES
    pool = cache._pool(0)
    free, kept_buffers = int(pool.state[1]), sum(1 for b in cache._buffers[0].tolist() if b >= 0)
    held = sum(1 for e in cache._guesses[0, :, 0].tolist() if e >= 0) if guesses else 0
    assert free + kept_buffers + held == len(pool.memory)


def test_alone_the_link_brings_all() -> None:
    cache, host = make(8, 3, 2, 0, "lru", "forward")
    assert cache.splits is not None
    cache.splits.desk[ALONE] = 1
    for _ in range(20):
        needed = random.sample(range(8), 2)
        found = cache.find(0, torch.tensor([needed]), 1)
        cache.copy(0, 0, shared=True)
        cache.copy(0, 1, shared=True)
        for place, expert in zip(found.places.tolist(), needed, strict=True):
            assert torch.equal(found.pool[place], host[expert])


def test_a_link_that_brings_all_is_tried_again_with_the_cpu() -> None:
    cache, _ = make(8, 0, 2, 0, "lru", "forward")
    splits = cache.splits
    assert splits is not None
    splits.desk[STEP], splits.desk[RATIO:] = 16, ONE
    for _ in range(600):
        cache.find(0, torch.tensor([[1, 2]]), 1)
    share = int(splits.desk[RATIO + 2])
    assert share < ONE and split([share, share], 2)[0] < 2
