"""Copies that are handed over to the copy engine's thread: the same bytes as a kernel's, whatever that thread does."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_device_cache import CPU, PIECE, WARPS, emulator, make

from moeflow.errors import DeviceError
from moeflow.offload import copy_engine
from moeflow.offload.device import DeviceCache
from moeflow.offload.mover import FORGIVEN, Blobs, Mover
from moeflow.offload.spin_lock import SpinLock
from moeflow.offload.traffic import Traffic
from moeflow.schema.hardware import Cpu

pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

SECOND = 1_000_000_000


class Memory:
    """Copies at once; `before` is called ahead of each copy and may wait or raise."""

    def __init__(self, before: Callable[[], None] = lambda: None):
        self.before = before
        self.copied: list[int] = []

    def enter(self) -> None:
        pass

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.before()
        ctypes.memmove(target, source, nbytes)
        self.copied.append(nbytes)

    def announce(self, target: int, value: int) -> None:
        ctypes.c_int.from_address(target).value = value

    def wait(self) -> None:
        pass


def mover_of(
    memory: Memory, layers: Any, jobs: int, head: int = 1, least: int = 1, patience: int = 30 * SECOND
) -> Mover:
    return Mover(memory, layers, jobs, CPU, patience, head * PIECE, least * PIECE)


def step(
    cache: DeviceCache, host: torch.Tensor, layer: int, begin: bool = True, chosen: list[int] | None = None
) -> None:
    if begin and layer == 0 and cache.mover:
        cache.mover.begin(hand_over=True)
    experts = chosen or random.sample(range(8), 2)
    found = cache.find(layer, torch.tensor([experts]), 1)
    cache.copy(layer, 0)
    cache.copy(layer, 1)
    for expert, place in zip(experts, found.places.tolist(), strict=True):
        assert torch.equal(found.pool[place], host[layer, expert])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_spin_lock_lets_one_through() -> None:
    word = torch.zeros(16, dtype=torch.int32)
    lock = SpinLock(word.data_ptr())
    passed = []

    def wait() -> None:
        for i in range(3):
            lock.wait()
            passed.append(i)

    thread = threading.Thread(target=wait)
    thread.start()
    for i in range(3):
        time.sleep(0.02)
        assert len(passed) == i
        word[0] = lock.opened  # as a device would
        wait_until(lambda i=i: len(passed) > i)  # type: ignore[misc]
    thread.join()
    lock.open()
    lock.wait()  # opened before anybody waited
    lock.open()
    lock.close()
    assert int(word[0]) != lock.opened


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("head", [0, 1, 4, 1000])
def test_the_bytes_are_a_kernels(order: str, head: int) -> None:
    memory = Memory(lambda: time.sleep(random.choice([0, 0, 0.002])))
    cache, host = make(order=order, pieces=2 * WARPS + 9, mover=partial(mover_of, memory, head=head))
    assert cache.mover is not None
    for _ in range(12):
        step(cache, host, 0)
        cache.guess(1, torch.tensor(random.sample(range(8), 2)))
        cache._stop[1] = random.randrange(2)
        cache.copy_guesses(1)
        # As if the flag had been raised midway: some warps have come further than others, and left the rest as it was.
        cache._progress[1] = (cache._progress[1] * torch.rand(cache._progress[1].shape)).int()
        for g, (expert, buffer) in enumerate(cache._guesses[1].tolist()):
            for warp, done in enumerate(cache._progress[1, g].tolist() if expert >= 0 else ()):
                for piece in range(warp + done * WARPS, host.shape[2] // PIECE, WARPS):
                    cache._pool(1).memory[buffer, piece * PIECE : (piece + 1) * PIECE] = 0
        step(cache, host, 1)
    traffic = cache.count(Traffic())
    kept_by_guesses = int(cache._bytes[:, 2].sum())  # moved on a guess and used
    assert traffic.missed_bytes + kept_by_guesses == (traffic.misses + traffic.guesses_used) * host.shape[2]
    assert memory.copied
    assert cache.mover.problem is None
    cache.mover.close()


def test_few_bytes_are_left_to_kernels() -> None:
    memory = Memory()
    cache, host = make(pieces=300, guesses=0, quota=(2, 2), mover=partial(mover_of, memory, head=0, least=301))
    assert cache.mover is not None
    cache.mover.begin(hand_over=True)
    for pair in ([1, 5], [2, 6], [4, 7]):
        for chosen, handed in (([[3, 3]], False), ([pair], True)):
            before = len(memory.copied)
            found = cache.find(0, torch.tensor(chosen), 2 if chosen[0][0] == chosen[0][1] else 1)
            cache.copy(0, 0)
            cache.copy(0, 1)
            assert (len(memory.copied) > before) == handed
            for expert, place in zip(chosen[0], found.places.tolist(), strict=True):
                assert torch.equal(found.pool[place], host[0, expert])
    cache.mover.close()


def pass_of(cache: DeviceCache, host: torch.Tensor) -> None:
    for layer in range(2):
        step(cache, host, layer)


def test_what_does_not_come_is_taken_back() -> None:
    go_on = threading.Event()
    memory = Memory(lambda: go_on.wait(60) and None)
    cache, host = make(pieces=40, quota=(2, 2), mover=partial(mover_of, memory, patience=SECOND // 20))
    mover = cache.mover
    assert mover is not None
    pass_of(cache, host)  # the first copy waits for a twentieth of a second, the others not at all
    assert not memory.copied
    threading.Timer(0.1, go_on.set).start()
    for _ in range(10):  # the next pass waits for the late copy, which brings what is there already
        pass_of(cache, host)
    assert len(memory.copied) > 4
    assert mover.problem is None
    mover.close()


def test_a_late_copy_while_another_pass_is_under_way_is_an_error() -> None:
    go_on = threading.Event()
    memory = Memory(lambda: go_on.wait(60) and None)
    cache, host = make(pieces=40, quota=(2, 2), mover=partial(mover_of, memory, patience=SECOND // 20))
    mover = cache.mover
    assert mover is not None
    mover.begin(
        hand_over=True
    )  # this one was begun ahead; nothing of it is handed over any more, but buffers change hands
    pass_of(cache, host)
    go_on.set()
    wait_until(lambda: mover._late)
    with pytest.raises(DeviceError, match="stopped within a copy"):
        mover.begin(hand_over=True)
    cache.reset()
    memory.copied.clear()
    pass_of(cache, host)
    assert memory.copied
    mover.close()


def test_a_thread_that_is_always_late_is_asked_no_more() -> None:
    cache, host = make(pieces=40, quota=(2, 2), mover=partial(mover_of, Memory(), patience=SECOND // 1000))
    mover = cache.mover
    assert mover is not None
    for _ in range(FORGIVEN * 20):
        mover.begin(hand_over=True)
        if mover.problem is not None:
            break
        with mover._moving:
            step(cache, host, 0, begin=False)
            step(cache, host, 1)
    assert mover.problem is not None
    assert "too slow" in mover.problem
    pass_of(cache, host)
    mover.close()


def test_a_request_that_was_taken_back_is_not_carried_out() -> None:
    memory = Memory()
    cache, host = make(pieces=40, quota=(2, 2), mover=partial(mover_of, memory, patience=SECOND // 50))
    mover = cache.mover
    assert mover is not None
    with mover._moving:  # the thread has not even read it
        pass_of(cache, host)
    time.sleep(0.05)
    assert not memory.copied
    assert not mover._late
    for _ in range(4):  # new passes, and a new chance
        pass_of(cache, host)
    assert memory.copied
    mover.close()


def test_a_pass_that_is_issued_kernel_by_kernel_hands_nothing_over() -> None:
    memory = Memory()
    cache, host = make(pieces=40, quota=(2, 2), mover=partial(mover_of, memory))
    mover = cache.mover
    assert mover is not None
    for turn in range(6):
        before = len(memory.copied)
        mover.begin(hand_over=turn % 2 == 1)
        step(cache, host, 1, chosen=[2 * turn % 8, 2 * turn % 8 + 1])  # always missing
        assert (len(memory.copied) > before) == (turn % 2 == 1)
        wait_until(lambda: not mover._wake.is_set())
    mover.close()


def test_an_error_leaves_all_to_kernels() -> None:
    def refuse() -> None:
        raise DeviceError("CUDA error 700")

    cache, host = make(pieces=40, mover=partial(mover_of, Memory(refuse), patience=SECOND // 20))
    mover = cache.mover
    assert mover is not None
    for turn in range(6):
        pass_of(cache, host)
        if turn == 3:
            wait_until(lambda: mover.problem is not None)
            cache.reset()
    assert mover.problem is not None
    assert mover._taken_back <= 1
    assert "CUDA error 700" in mover.problem
    mover.close()


def test_between_passes_the_thread_sleeps() -> None:
    cache, host = make(pieces=40, quota=(2, 2), mover=partial(mover_of, Memory()))
    mover = cache.mover
    assert mover is not None
    for _ in range(5):
        step(cache, host, 0)
        assert mover._wake.is_set()
        step(cache, host, 1)  # the last layer of a pass
        wait_until(lambda: not mover._wake.is_set())
    step(cache, host, 0)
    cache.reset()  # the pass was abandoned
    wait_until(lambda: not mover._wake.is_set())
    mover.close()
    assert not mover._thread.is_alive()
    mover.close()


def test_a_cache_that_is_dropped_ends_its_thread() -> None:
    cache, _ = make(mover=partial(mover_of, Memory()))
    assert cache.mover is not None
    thread = cache.mover._thread
    del cache
    thread.join(10)
    assert not thread.is_alive()


def test_where_nothing_can_feed_the_engine_kernels_copy() -> None:
    def refuse(*_: Any) -> Mover:
        raise DeviceError("no libcuda")

    cache, host = make(mover=refuse)
    assert cache.mover is None
    assert cache.alone is not None
    assert "no libcuda" in cache.alone
    step(cache, host, 0)


@pytest.mark.parametrize(
    ("cores", "split", "fed"), [(16, 9000, True), (4, 1024, True), (2, 9000, False), (16, 1023, False)]
)
def test_the_copy_engine_is_fed_where_that_pays(
    monkeypatch: pytest.MonkeyPatch, cores: int, split: int, fed: bool
) -> None:
    monkeypatch.setattr(copy_engine, "find_cpu", lambda: Cpu(name="x", cores=cores))
    monkeypatch.setattr(copy_engine, "CopyEngine", lambda _: Memory())
    mover = copy_engine.copy_engine_mover(CPU, [Blobs(0, 0, 2 * split * PIECE, split)] * 2, 4)
    assert (mover is not None) == fed
    if mover:
        mover.close()
