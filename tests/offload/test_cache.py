"""The expert cache on a link that copies as late as it may: whatever is yielded must be the right expert's bytes."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor

from moeflow.artifact.layout import expert_layout
from moeflow.errors import StorageError
from moeflow.offload.cache import ExpertCache
from moeflow.offload.policy import LruPolicy
from moeflow.offload.traffic import Traffic
from moeflow.schema import DenseScheme, ExpertLayer, Manifest, Plan

EXPERTS = 8


class LateLink:
    """Copies nothing before somebody waits, then everything asked for up to there, in order."""

    def __init__(self) -> None:
        self.queue: deque[tuple[int, int, Tensor]] = deque()
        self.asked: list[tuple[int, int]] = []

    def fetch(self, layer: int, expert: int, target: Tensor) -> Any:
        job = (layer, expert, target)
        self.queue.append(job)
        self.asked.append((layer, expert))
        return LateTicket(self, job)

    def close(self) -> None:
        self.queue.clear()


class LateTicket:
    def __init__(self, link: LateLink, job: tuple[int, int, Tensor]):
        self.link, self.job = link, job

    def wait(self) -> None:
        while any(job is self.job for job in self.link.queue):
            layer, expert, target = self.link.queue.popleft()
            target.fill_(mark(layer, expert))

    def settle(self) -> None:
        pass


def mark(layer: int, expert: int) -> int:
    return layer * EXPERTS + expert


def make_cache(
    slots: tuple[int, ...], staging: int, policy: str = "lru", mixed: bool = False
) -> tuple[ExpertCache, LateLink, Traffic]:
    """A cache of layers that are all alike; `mixed`: their odd experts have blobs of half the size."""
    layouts = tuple(expert_layout(64, inner, DenseScheme(), "bfloat16") for inner in (64, 32))
    own = (0, 1) * (EXPERTS // 2) if mixed else ()
    layers = tuple(
        ExpertLayer(
            module="m", router="r", experts=EXPERTS, layout=0, expert_layouts=own, shard="s", data_offset=0,
            digests=(), relative_error=0.0,
        )
        for _ in slots
    )  # fmt: skip
    manifest = Manifest.model_construct(layouts=layouts, layers=layers)
    hot = (tuple(range(EXPERTS)),) * len(slots) if policy == "static" else ()
    plan = Plan.model_construct(cache_slots=slots, staging_slots=staging, policy=policy, hot_experts=hot)
    link, traffic = LateLink(), Traffic()
    return ExpertCache(manifest, plan, link, torch.device("cpu"), traffic), link, traffic


def use(cache: ExpertCache, layer: int, needed: list[int], guesses: Any = ()) -> list[int]:
    order = []
    for expert, blob in cache.fetch(layer, needed, guesses):
        assert torch.all(blob == mark(layer, expert)), f"layer {layer}, expert {expert}: another expert's bytes"
        assert blob.nbytes == cache._layers[layer].sizes[expert]
        order.append(expert)
    assert sorted(order) == sorted(needed)
    return order


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("policy", ["lru", "lfu", "mix", "static"])
@pytest.mark.parametrize("staging", [1, 2, 5])
@pytest.mark.parametrize("slots", [(0, 0, 0), (1, 1, 1), (2, 5, 0), (8, 8, 8)])
def test_random_use_with_random_guesses_yields_the_right_bytes(
    slots: tuple[int, ...], staging: int, policy: str, mixed: bool
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    cache, link, traffic = make_cache(slots, staging, policy, mixed)
    uses = 0
    for _ in range(150):
        for layer in range(len(slots)):
            needed = rng.sample(range(EXPERTS), rng.randint(1, EXPERTS))
            ahead = rng.randint(layer, len(slots) - 1)
            guesses = [(ahead, e) for e in rng.sample(range(EXPERTS), rng.randint(0, 4)) if ahead != layer]
            use(cache, layer, needed, guesses)
            uses += len(needed)
            assert len(cache.resident(layer)) <= slots[layer]
    assert traffic.uses == uses
    assert len(link.asked) == traffic.misses + traffic.guesses


def test_without_guesses_the_cache_is_the_policy() -> None:
    cache, _, traffic = make_cache((3,), staging=2)
    policy, hits, rng = LruPolicy(3), 0, random.Random(5)
    for _ in range(500):
        needed = sorted(rng.sample(range(EXPERTS), 2))
        kept = [e for e in needed if e in policy]
        hits += len(kept)
        for expert in kept:
            policy.touch(expert)
        for expert in needed:
            if expert not in kept:
                policy.admit(expert)
        use(cache, 0, needed)
        assert {e for e in range(EXPERTS) if e in policy} == set(cache.resident(0))
    assert traffic.hits == hits


def test_a_guess_never_evicts_a_cached_expert() -> None:
    cache, _, _ = make_cache((2, 2), staging=2)
    use(cache, 1, [0, 1])
    for guess in range(2, EXPERTS):
        use(cache, 0, [guess], [(1, guess)])
        assert set(cache.resident(1)) == {0, 1}


def test_a_used_guess_takes_the_place_of_the_least_recent_without_a_second_copy() -> None:
    cache, link, traffic = make_cache((2, 2), staging=2)
    use(cache, 1, [0, 1])
    use(cache, 0, [3], [(1, 5)])
    use(cache, 1, [5])
    assert set(cache.resident(1)) == {1, 5}
    assert link.asked.count((1, 5)) == 1
    assert traffic.guesses_used == 1


def test_guesses_come_after_all_that_is_needed() -> None:
    cache, link, _ = make_cache((2, 2), staging=4)
    use(cache, 0, [1, 2], [(1, 6), (1, 7)])
    assert link.asked == [(0, 1), (0, 2), (1, 6), (1, 7)]


def test_guesses_of_one_step_do_not_take_each_others_buffers() -> None:
    """The likelier come first and stay; the others find no room."""
    cache, link, traffic = make_cache((0, 0), staging=2)
    use(cache, 0, [0], [(1, e) for e in (5, 6, 7, 3)])
    assert [job for job in link.asked if job[0] == 1] == [(1, 5), (1, 6)]
    use(cache, 1, [5, 6])
    assert (traffic.guesses, traffic.guesses_used) == (2, 2)


def test_a_guess_that_could_not_be_read_is_a_miss() -> None:
    class Broken:
        def wait(self) -> None:
            raise StorageError("the disk did not answer")

        def settle(self) -> None:
            pass

    cache, link, _ = make_cache((2, 2), staging=2)
    use(cache, 0, [0], [(1, 5)])
    cache._layers[1].landings[5].ticket = Broken()
    use(cache, 1, [5])
    assert link.asked.count((1, 5)) == 2
    link.fetch = lambda *_: Broken()  # type: ignore[method-assign]
    with pytest.raises(StorageError):
        use(cache, 1, [6])


def test_after_a_reset_the_cache_is_cold_and_serves() -> None:
    cache, link, _ = make_cache((2, 2), staging=2)
    for expert, _blob in cache.fetch(0, [1, 2, 3], [(1, 6)]):
        if expert == 2:
            break  # abandoned: landings have no owner
    link.close()
    cache.reset()
    assert cache.resident(0) == {}
    for _ in range(5):
        use(cache, 0, [1, 2, 3], [(1, 6)])
        use(cache, 1, [6, 7])


def test_cached_experts_are_computed_while_others_arrive() -> None:
    cache, _, _ = make_cache((4,), staging=2)
    use(cache, 0, [3, 7])
    assert use(cache, 0, [1, 3, 7])[0] in (3, 7)


def test_an_unused_guess_gives_way_to_need() -> None:
    cache, link, _ = make_cache((0, 0), staging=1)
    use(cache, 0, [0], [(1, 1)])
    use(cache, 0, [2])
    use(cache, 1, [1])
    assert link.asked == [(0, 0), (1, 1), (0, 2), (1, 1)]


@pytest.mark.parametrize("staging", [1, 3])
@pytest.mark.parametrize("policy", ["lru", "lfu", "mix", "static"])
def test_warming_from_the_caches_own_slots_keeps_every_blob(policy: str, staging: int) -> None:
    """Cached experts are handed back as views of their slots, which an eviction in between would overwrite."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    cache, _, _ = make_cache((4,), staging=staging, policy=policy)
    for _ in range(300):
        use(cache, 0, rng.sample(range(EXPERTS), rng.randint(1, 3)))
        cached = cache.resident(0)
        elsewhere = {e: torch.full((cache._layers[0].sizes[e],), mark(0, e), dtype=torch.uint8) for e in range(EXPERTS)}
        recent = rng.sample(range(EXPERTS), 4)
        cache.warm(0, [(e, cached.get(e, elsewhere[e])) for e in recent])
        for expert, blob in cache.resident(0).items():
            assert torch.all(blob == mark(0, expert))
        if policy == "lru":
            assert set(recent) == set(cache.resident(0))


def test_warming_keeps_the_most_recent() -> None:
    cache, link, _ = make_cache((2,), staging=1)
    blob = {e: torch.full((cache._layers[0].sizes[e],), mark(0, e), dtype=torch.uint8) for e in range(EXPERTS)}
    cache.warm(0, [(4, blob[4]), (6, blob[6])])
    assert set(cache.resident(0)) == {4, 6}
    use(cache, 0, [4, 6])
    assert not link.asked
