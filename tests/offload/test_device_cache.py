"""The device's cache against the host's policies, step by step, its kernels run by the emulator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeflow.offload.device import PIECE, WARPS, DeviceCache, MakeMover
from moeflow.offload.policy import LearnedPolicy, Rule
from moeflow.offload.traffic import Traffic

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

CPU = torch.device("cpu")


def make(
    experts: int = 8,
    layers: int = 2,
    quota: Sequence[int] = (3, 2),
    choices: int = 2,
    guesses: int = 2,
    policy: str = "lru",
    order: str = "forward",
    pieces: int = 5,
    mover: MakeMover | None = None,
    half_life: float = 6,
) -> tuple[DeviceCache, torch.Tensor]:
    """A cache over random blobs; the second result is host memory [layers, experts, bytes]."""
    nbytes = pieces * PIECE
    down = SimpleNamespace(segments=[SimpleNamespace(offset=3 * PIECE - 256)])  # gate and up end inside a piece
    layout: Any = SimpleNamespace(nbytes=nbytes, matrices=(None, down))
    manifest: Any = SimpleNamespace(
        layers=[SimpleNamespace(experts=experts, layout=0)] * layers, layouts=[layout], layout_of=lambda _: layout
    )
    plan: Any = SimpleNamespace(
        policy=policy, half_life=half_life, hot_experts=hot(policy, experts, quota), strategy="full",
        cache_slots=tuple(quota), staging_slots=choices + guesses,
        prefetch=SimpleNamespace(depth=int(guesses > 0), experts=guesses),
    )  # fmt: skip
    host = torch.randint(256, (layers, experts, nbytes), dtype=torch.uint8)
    launcher = emulator.EmulatedLauncher(order, seed=random.randrange(1 << 30))
    return DeviceCache(manifest, plan, launcher, [host[i].data_ptr() for i in range(layers)], CPU, mover), host


def hot(policy: str, experts: int, quota: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Of static, some experts that are not the first ones, other ones in each layer."""
    kept = (tuple((3 * i + 5 * layer + 2) % experts for i in range(k)) for layer, k in enumerate(quota))
    return tuple(kept) if policy == "static" else ()


class Oracle:
    """One layer, as `offload.cache` orders uses: cached experts, then arrived guesses, then misses, ids ascending."""

    def __init__(self, policy: str, quotas: Sequence[int], layer: int, experts: int, half_life: float = 6):
        self.policy = Rule(policy, half_life, hot(policy, experts, quotas)).make(layer, quotas[layer])
        self.hits = self.misses = self.used = 0

    def step(self, needed: Sequence[int], guessed: Sequence[int]) -> None:
        wanted = sorted(set(needed))
        hits = [e for e in wanted if e in self.policy]
        landed = [e for e in wanted if e not in self.policy and e in guessed]
        misses = [e for e in wanted if e not in self.policy and e not in guessed]
        self.hits, self.used, self.misses = self.hits + len(hits), self.used + len(landed), self.misses + len(misses)
        for expert in hits:
            self.policy.touch(expert)
        for expert in landed + misses:
            self.policy.admit(expert)


def judge(cache: DeviceCache, layer: int, oracle: Oracle, experts: int) -> None:
    """Of the policy learned: random scores, some of them equal, for both."""
    if isinstance(oracle.policy, LearnedPolicy):
        scores = (3 * torch.randn(experts)).round() / 7
        cache.judge(layer, scores)
        oracle.policy.judge(scores.tolist())


@pytest.mark.parametrize("policy", ["lru", "lfu", "mix", "static", "learned"])
@pytest.mark.parametrize("quota", [(0, 0), (1, 5), (3, 2), (8, 8)])
@pytest.mark.parametrize("shape", [(8, 2, 2), (40, 4, 3), (8, 2, 0)], ids=str)
def test_every_step_is_the_policys(policy: str, quota: tuple[int, int], shape: tuple[int, int, int]) -> None:
    experts, top_k, guesses = shape
    cache, host = make(experts, 2, quota, top_k, guesses, policy, order=random.choice(["forward", "reverse", "random"]))
    oracles = [Oracle(policy, quota, layer, experts) for layer in range(2)]
    for _ in range(60):
        guessed: list[int] = []
        for layer in range(2):
            chosen = torch.tensor([random.sample(range(experts), top_k)])
            judge(cache, layer, oracles[layer], experts)
            found = cache.find(layer, chosen, 1)
            cache.copy(layer, 0)
            cache.copy(layer, 1)
            for expert, place in zip(chosen[0].tolist(), found.places.tolist(), strict=True):
                assert torch.equal(found.pool[place], host[layer, expert])
            oracles[layer].step(chosen[0].tolist(), guessed if layer else [])
            kept = cache.resident(layer)
            assert set(kept) == {e for e in range(experts) if e in oracles[layer].policy}
            for expert, blob in kept.items():
                assert torch.equal(blob, host[layer, expert])
            if layer == 0 and guesses:
                guessed = random.sample(range(experts), min(guesses, top_k))
                cache.guess(1, torch.tensor(guessed))
                cache.copy_guesses(1)
                # The layer just computed may still be read: what it found must not be overwritten by guesses.
                for expert, place in zip(chosen[0].tolist(), found.places.tolist(), strict=True):
                    assert torch.equal(found.pool[place], host[layer, expert])
                made = set(cache._guesses[1, :, 0].tolist()) - {-1}
                guessed = [e for e in guessed if e in made]
    traffic = cache.count(Traffic())
    assert traffic.hits == sum(o.hits for o in oracles)
    assert traffic.misses == sum(o.misses for o in oracles)
    assert traffic.guesses_used == sum(o.used for o in oracles)
    nbytes = host.shape[2]
    assert traffic.missed_bytes == traffic.misses * nbytes
    assert traffic.guessed_bytes == traffic.guesses * nbytes
    assert cache.wasted_bytes == (traffic.guesses - traffic.guesses_used) * nbytes


@pytest.mark.parametrize("half_life", [1, 1.7, 128, 1e300])
def test_scores_are_the_policys_bit_for_bit(half_life: float) -> None:
    """Through a hundred rescalings where the half life is short; where it is long, through ties, too."""
    cache, _ = make(40, 2, (7, 1), 4, 0, "mix", half_life=half_life)
    oracles = [Oracle("mix", (7, 1), layer, 40, half_life) for layer in range(2)]
    for _ in range(400):
        for layer, oracle in enumerate(oracles):
            needed = [min(39, int(random.expovariate(0.15))) for _ in range(4)]
            needed = list(dict.fromkeys(needed))
            cache.find(layer, torch.tensor([needed]), 1)
            oracle.step(needed, [])
            policy: Any = oracle.policy
            scores = cache._counts[layer].tolist()
            assert scores[:40] == [policy._scores.get(e, 0.0) for e in range(40)]
            assert scores[40] == policy._weight
            assert set(cache.resident(layer)) == {e for e in range(40) if e in policy}


@pytest.mark.parametrize("policy", ["lru", "lfu", "mix", "static", "learned"])
def test_several_tokens_decide_as_one_step_of_their_experts(policy: str) -> None:
    cache, host = make(8, 2, (3, 5), 8, 0, policy)
    oracles = [Oracle(policy, (3, 5), layer, 8) for layer in range(2)]
    for _ in range(60):
        for layer, oracle in enumerate(oracles):
            tokens = random.randint(1, 4)
            chosen = torch.stack([torch.tensor(random.sample(range(8), 2)) for _ in range(tokens)])
            judge(cache, layer, oracle, 8)
            found = cache.find(layer, chosen, tokens)
            cache.copy(layer, 0)
            cache.copy(layer, 1)
            for expert, place in zip(chosen.flatten().tolist(), found.places.tolist(), strict=True):
                assert torch.equal(found.pool[place], host[layer, expert])
            oracle.step(chosen.flatten().tolist(), [])
            assert set(cache.resident(layer)) == {e for e in range(8) if e in oracle.policy}
    assert cache.count(Traffic()).hits == sum(oracle.hits for oracle in oracles)


def test_a_reset_cache_decides_as_a_fresh_one() -> None:
    for policy in ("mix", "static"):
        cache, _ = make(8, 2, (3, 2), 2, 0, policy)
        kept: list[list[set[int]]] = []
        steps = [random.sample(range(8), 2) for _ in range(60)]
        for _ in range(2):
            cache.reset()
            kept.append([])
            for needed in steps:
                cache.find(0, torch.tensor([needed]), 1)
                kept[-1].append(set(cache.resident(0)))
        assert kept[0] == kept[1]


def test_warming_keeps_of_a_static_set_whom_it_is_given() -> None:
    cache, host = make(quota=(3, 3), policy="static")
    mine = hot("static", 8, (3, 3))[1]
    cache.warm(1, [(e, host[1, e]) for e in mine[:2]])
    assert set(cache.resident(1)) == set(mine[:2])
    for expert, blob in cache.resident(1).items():
        assert torch.equal(blob, host[1, expert])


@pytest.mark.parametrize("policy", ["lru", "static", "learned"])
def test_every_buffer_has_one_owner(policy: str) -> None:
    cache, _ = make(quota=(2, 1), policy=policy)
    for _ in range(100):
        for layer in range(2):
            judge(cache, layer, Oracle(policy, (2, 1), layer, 8), 8)
            cache.find(layer, torch.tensor([random.sample(range(8), 2)]), 1)
            if layer == 0:
                cache.guess(1, torch.tensor(random.sample(range(8), 2)))
            pool = cache._pool(layer)
            head, size = pool.state.tolist()
            free = [pool.ring.tolist()[(head + i) % len(pool.ring)] for i in range(size)]
            kept = [b for b in cache._buffers.flatten().tolist() if b >= 0]
            held = [b for e, b in cache._guesses.view(-1, 2).tolist() if e >= 0]
            assert sorted(free + kept + held) == list(range(len(pool.memory)))


def test_a_guess_that_was_stopped_is_completed() -> None:
    cache, host = make(pieces=200, quota=(2, 2))
    cache.find(0, torch.tensor([[0, 1]]), 1)
    cache.guess(1, torch.tensor([5, 6]))
    cache._stop[1] = 1
    cache.copy_guesses(1)
    assert cache.count(Traffic()).guessed_bytes == 0
    cache._stop[1] = 0
    cache.copy_guesses(1)
    # As if some warps had come further than others when the flag was raised.
    full = cache._progress[1].clone()
    cache._progress[1] = (full * torch.rand(full.shape)).int()
    buffers = dict(cache._guesses[1].tolist())
    for g, (_, buffer) in enumerate(cache._guesses[1].tolist()):
        for warp, done in enumerate(cache._progress[1, g].tolist()):
            for piece in range(warp + done * WARPS, 200, WARPS):
                cache._pool(1).memory[buffer, piece * PIECE : (piece + 1) * PIECE] = 0
    found = cache.find(1, torch.tensor([[6, 2]]), 1)
    assert found.places[0] == buffers[6]
    cache.copy(1, 0)
    cache.copy(1, 1)
    assert torch.equal(found.pool[found.places[0]], host[1, 6])
    assert torch.equal(found.pool[found.places[1]], host[1, 2])
    moved, done = cache.count(Traffic()).missed_bytes, int(cache._progress[1, 1].sum()) * PIECE
    assert moved == 2 * host.shape[2] - done


def test_several_tokens_read_each_expert_once() -> None:
    cache, host = make(choices=8, guesses=0)
    for _ in range(20):
        chosen = torch.stack([torch.tensor(random.sample(range(8), 2)) for _ in range(4)])
        found = cache.find(1, chosen, 4)
        cache.copy(1, 0)
        cache.copy(1, 1)
        assert found.buffers is not None and found.starts is not None and found.lists is not None
        distinct = sorted(set(chosen.flatten().tolist()))
        for i, expert in enumerate(distinct):
            served = found.lists[found.starts[i] : found.starts[i + 1]].tolist()
            assert served == [c for c, e in enumerate(chosen.flatten().tolist()) if e == expert]
            assert torch.equal(found.pool[found.buffers[i]], host[1, expert])
        assert found.starts[len(distinct) :].tolist() == [8] * (9 - len(distinct))


def test_guesses_that_are_never_right_are_rarely_tried() -> None:
    cache, _ = make(quota=(2, 2))
    issued = []
    for _ in range(300):
        cache.find(0, torch.tensor([[0, 1]]), 1)
        before = cache.count(Traffic()).guesses
        cache.guess(1, torch.tensor([6, 7]))
        issued.append(cache.count(Traffic()).guesses - before)
        cache.find(1, torch.tensor([random.sample(range(6), 2)]), 1)
    assert sum(issued[:10]) == 20
    assert sum(issued[100:]) <= 2 * (200 // 16 + 1)


@pytest.mark.parametrize("policy", ["lru", "lfu", "mix"])
@pytest.mark.parametrize("quota", [1, 3, 7])
def test_warming_keeps_the_last_used(policy: str, quota: int) -> None:
    cache, host = make(quota=(quota, quota), policy=policy)
    for _ in range(50):
        resident = cache.resident(1)
        recent = random.sample(range(8), random.randrange(quota, 9))
        elsewhere = host[1].clone()
        cache.warm(1, [(e, resident.get(e, elsewhere[e])) for e in recent])
        for expert, blob in cache.resident(1).items():
            assert torch.equal(blob, host[1, expert])
        if policy == "lru":
            assert set(cache.resident(1)) == set(recent[-quota:])
        cache.find(1, torch.tensor([random.sample(range(8), 2)]), 1)
        cache.copy(1, 0)
        cache.copy(1, 1)
