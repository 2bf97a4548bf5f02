"""Page-locked host memory is unregistered before it is freed, whoever forgets to close it."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeflow.artifact.reader import Artifact
from moeflow.offload import store as module
from moeflow.offload.store import HostStore


class Driver:
    """What CUDA has registered; memory that is freed before it is let go of shows as an address that is refused."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.seen: list[int] = []

    def register(self, memory: torch.Tensor) -> str | None:
        if any(at < memory.data_ptr() + memory.nbytes and memory.data_ptr() < at + n for at, n in self.held.items()):
            return "part or all of the requested memory range is already mapped"
        self.held[memory.data_ptr()] = memory.nbytes
        self.seen.append(memory.data_ptr())
        return None

    def unregister(self, memory: torch.Tensor) -> None:
        assert self.held.pop(memory.data_ptr()) == memory.nbytes


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(module, "_register", fake.register)
    monkeypatch.setattr(module, "_unregister", fake.unregister)
    return fake


@pytest.fixture
def make(tiny_artifact: Path) -> Callable[[], HostStore]:
    return lambda: HostStore(Artifact.open(tiny_artifact), (8, 8), pin=True)


def test_memory_and_its_storage_begin_at_a_page(make: Callable[[], HostStore], driver: Driver) -> None:
    """torch asks CUDA about the storage's first byte when it is asked whether a tensor is page-locked."""
    store = make()
    for layer, address in enumerate(driver.seen):
        view = store.view(layer, 5)
        assert address % 4096 == 0 and view.data_ptr() == address + store.place(layer, 5).start
        assert view.untyped_storage().data_ptr() == address
    store.close()
    assert HostStore(store.artifact, (0, 8), pin=True).pinned


def test_closing_unregisters_once(driver: Driver, make: Callable[[], HostStore]) -> None:
    store = make()
    assert store.pinned and len(driver.held) == 2
    store.close()
    assert not driver.held
    store.close()
    del store
    gc.collect()
    assert len(driver.seen) == 2


def test_a_store_that_nobody_closed_unregisters_when_it_is_dropped(
    driver: Driver, make: Callable[[], HostStore]
) -> None:
    for _ in range(3):  # the allocator gives the same addresses again
        store = make()
        assert store.refused is None and len(driver.held) == 2
        store.itself = store  # type: ignore[attr-defined]  # a cycle, as those of models
        del store
        gc.collect()
        assert not driver.held


def test_views_outlive_the_registration(driver: Driver, make: Callable[[], HostStore]) -> None:
    store = make()
    view = store.view(1, 3)
    before = view.clone()
    del store
    gc.collect()
    assert not driver.held and torch.equal(view, before)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_registration_leaves_nothing(
    driver: Driver, make: Callable[[], HostStore], monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    def interrupted(memory: torch.Tensor) -> str | None:
        driver.register(memory)
        if len(driver.seen) > layer:
            raise KeyboardInterrupt
        return None

    monkeypatch.setattr(module, "_register", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert not driver.held and len(driver.seen) == layer + 1


def test_what_was_refused_is_not_unregistered(
    driver: Driver, make: Callable[[], HostStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_register", lambda m: driver.register(m) if not driver.seen else "out of memory")
    store = make()
    assert store.refused is not None and len(driver.held) == 1
    store.close()
    assert not driver.held


def test_a_device_that_is_gone_is_no_error(
    driver: Driver, make: Callable[[], HostStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: torch.Tensor) -> None:
        raise RuntimeError("CUDA driver shutting down")

    store = make()
    monkeypatch.setattr(module, "_unregister", gone)
    store.close()
    assert not store._held and len(driver.held) == 2


def test_the_end_of_the_process_unregisters(tiny_artifact: Path) -> None:
    program = f"""
    from moeflow.artifact.reader import Artifact
    from moeflow.offload import store

    store._register = lambda memory: None
    store._unregister = lambda memory: print("unregistered", memory.nbytes > 0, flush=True)
    kept = store.HostStore(Artifact.open({str(tiny_artifact)!r}), (8, 8), pin=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout == "unregistered True\n" * 2
