"""Rates count the right bytes and keep to the right order; how fast this machine is, is not tested."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from emulator.launcher import EmulatedLauncher, available

from moeflow.errors import DeviceError
from moeflow.probe import bandwidth, cuda
from moeflow.probe.bandwidth import copy_rate, copy_rates, device_rate, kernel_rates, link_rate, link_rates, read_rate
from moeflow.probe.measurement import REPEATS, Measurement
from moeflow.schema import Gpu

MIB = 1 << 20


def tick(monkeypatch: pytest.MonkeyPatch, module: object, seconds: list[float]) -> None:
    """Let the clock of `module` go on by these seconds between one look and the next, then by the last of them."""
    steps = itertools.chain([0.0], seconds, itertools.repeat(seconds[-1]))
    clock = itertools.accumulate(steps)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))  # type: ignore[attr-defined]


@pytest.mark.parametrize("measure", [copy_rate, read_rate])
def test_a_real_measurement_gives_a_rate(measure: Callable[[int], Measurement]) -> None:
    found = measure(4 * MIB)
    assert 0 < found.rate < 1e14
    assert 0 <= found.spread < 100


@pytest.mark.parametrize(("measure", "moved"), [(copy_rate, 1), (read_rate, 2)])
def test_bytes_are_counted(monkeypatch: pytest.MonkeyPatch, measure: Callable[[int], Measurement], moved: int) -> None:
    """Every pass takes half a second by the clock: the rate is twice the bytes, and follows them."""
    tick(monkeypatch, bandwidth, [0.5])
    assert measure(MIB).rate == pytest.approx(moved * 2 * MIB)
    assert measure(3 * MIB).rate == pytest.approx(moved * 6 * MIB)


def test_sizes_are_measured_each_and_copies_walk_through_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[int, int]] = []
    monkeypatch.setattr(bandwidth, "_host_buffer", lambda n: Recorder(n, places))
    tick(monkeypatch, bandwidth, [0.01])
    small, large = copy_rates([MIB, 4 * MIB])
    assert (small.rate, large.rate) == (pytest.approx(100 * MIB), pytest.approx(400 * MIB))
    of_small = [begin for begin, nbytes in places if nbytes == MIB]
    assert of_small[:6] == [0, MIB, 2 * MIB, 3 * MIB, 0, MIB]
    assert len(of_small) == 1 + 16
    assert [begin for begin, nbytes in places if nbytes == 4 * MIB] == [0] * (1 + REPEATS)


class Recorder:
    """Stands for a buffer; writes down which ranges are copied."""

    def __init__(self, nbytes: int, places: list[tuple[int, int]], begin: int = 0):
        self.nbytes, self.places, self.begin = nbytes, places, begin

    def __getitem__(self, at: slice) -> Recorder:
        assert 0 <= at.start < at.stop <= self.nbytes
        return Recorder(at.stop - at.start, self.places, at.start)

    def copy_(self, source: Recorder) -> None:
        assert (source.begin, source.nbytes) == (self.begin, self.nbytes)
        self.places.append((self.begin, self.nbytes))


def test_the_copy_is_one_of_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[torch.Tensor] = []

    def remember(nbytes: int) -> torch.Tensor:
        buffers.append(torch.full((nbytes,), len(buffers), dtype=torch.uint8))
        return buffers[-1]

    monkeypatch.setattr(bandwidth, "_host_buffer", remember)
    copy_rate(MIB)
    source, target = buffers
    assert source.nbytes == MIB
    assert target.data_ptr() != source.data_ptr()
    assert torch.equal(source, target)


def test_progress_is_told_in_bytes_to_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    read_rate(MIB, lambda *report: told.append(report))
    assert [done for _, done, _ in told] == [2 * MIB * n for n in range(1, REPEATS + 1)]
    assert {total for _, _, total in told} == {2 * MIB * REPEATS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers")
@pytest.mark.parametrize("measure", [link_rate, device_rate])
def test_a_gpu_that_refuses_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, measure: Callable[[int], Measurement]
) -> None:
    class Refusing:
        def __init__(self, _index: int):
            raise RuntimeError("CUDA out of memory\nand a long story")

    monkeypatch.setattr(torch.cuda, "device", Refusing)
    with pytest.raises(DeviceError, match=r"out of memory; end other programs") as caught:
        measure(MIB)
    assert "story" not in str(caught.value)


class FakeCuda:
    """Lets the GPU's measurements run on ordinary memory: every pass takes 10 ms, and calls are written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        calls = self.calls

        class Event:
            def __init__(self, enable_timing: bool = False):
                assert enable_timing

            def record(self, _stream: object) -> None:
                calls.append("record")

            def synchronize(self) -> None:
                calls.append("synchronize")

            def elapsed_time(self, _end: object) -> float:
                calls.append("elapsed")
                return 10.0

        really = torch.Tensor.copy_

        def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            calls.append(f"copy {non_blocking}")
            return really(target, source)

        def placed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def call(*arguments: object, **options: object) -> torch.Tensor:
                calls.extend(f"{key} {options.pop(key)}" for key in ("pin_memory", "device") if key in options)
                return make(*arguments, **options)

            return call

        monkeypatch.setattr(cuda, "WAKE_SECONDS", 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait for all"))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda _index: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _index: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("release device"))
        monkeypatch.setattr(
            torch.accelerator,
            "empty_host_cache",
            lambda: calls.append("release host"),
            raising=False,  # torch 2.11
        )
        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        for name in ("empty", "zeros", "ones"):
            monkeypatch.setattr(torch, name, placed(getattr(torch, name)))


WAKING = ["copy True", "wait for all"]
ONE_COPY = ["record", "copy True", "record", "synchronize", "elapsed"]


def test_the_link_is_timed_by_events_around_a_pinned_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    assert link_rate(4 * MIB).rate == pytest.approx(400 * MIB)
    assert fake.calls[:2] == ["pin_memory True", "device cuda:0"]
    assert fake.calls[2:] == WAKING + ONE_COPY * (1 + REPEATS) + ["release device", "release host"]


def test_the_bus_is_looked_at_while_copies_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    link_rates([MIB, 4 * MIB], under_load=lambda: fake.calls.append("look"))
    behind = fake.calls[2 + len(WAKING) + len(ONE_COPY) * (1 + 16 + 1 + REPEATS) :]
    copies = int(bandwidth.LOAD_SECONDS / 0.01)  # a copy takes 10 ms by the fake's clock
    assert behind == ["copy True"] * copies + ["look", "wait for all", "release device", "release host"]


def test_device_memory_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    assert device_rate(MIB).rate == pytest.approx(200 * MIB)
    assert "pin_memory True" not in fake.calls
    assert fake.calls.count("synchronize") == 1 + REPEATS


@pytest.mark.skipif(not available(), reason="no g++")
def test_the_copy_kernel_copies_every_byte_from_registered_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kernel on a CPU: its target holds what lay in host memory, at each place that is timed."""
    fake = FakeCuda(monkeypatch)
    held: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "device", lambda _name: "cpu")
    monkeypatch.setattr(bandwidth, "cuda_launcher", lambda _: EmulatedLauncher())
    monkeypatch.setattr(cuda, "register", lambda memory: held.append(memory.random_(256)))
    monkeypatch.setattr(cuda, "unregister", lambda _: fake.calls.append("unregister"))
    monkeypatch.setattr(cuda, "device_address", lambda pointer: pointer)
    make = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: targets.append(make(*a, **k)) or targets[-1])
    nbytes = 3 * 8192
    found = kernel_rates([8192, nbytes])
    assert [m.rate for m in found] == [pytest.approx(819_200), pytest.approx(100 * nbytes)]
    assert torch.equal(targets[-1], held[0])
    assert fake.calls[-4:] == ["wait for all", "unregister", "release device", "release host"]


def test_memory_that_the_driver_does_not_lock_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    monkeypatch.setattr(bandwidth, "cuda_launcher", lambda _: EmulatedLauncher())
    monkeypatch.setattr(cuda, "register", lambda _memory: "out of memory")
    with pytest.raises(DeviceError, match="would not page-lock 1 MiB: out of memory"):
        kernel_rates([MIB])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers")
def test_without_a_gpu_the_kernel_is_an_error() -> None:
    with pytest.raises(DeviceError, match="kernels run on a CUDA device"):
        kernel_rates([MIB])


def test_a_gpu_of_another_maker_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda.cuda_gpu() is None


def test_cuda_s_own_view_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="NVIDIA X", major=12, minor=1, total_memory=(100 << 30) + 5)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert cuda.cuda_gpu() == Gpu(name="NVIDIA X", memory=100 << 30, compute_capability="12.1")


def test_a_bus_at_rest_is_woken_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(cuda, "WAKE_SECONDS", 0.02)
    begin = time.monotonic()
    link_rates([MIB], under_load=None)
    first = fake.calls.index("record")
    assert time.monotonic() - begin >= 0.02
    assert first > 2 + len(WAKING)
    assert fake.calls[2:first] == WAKING * ((first - 2) // 2)


@pytest.mark.gpu
def test_rates_of_a_real_gpu_follow_the_bytes_they_count() -> None:
    """One buffer's copy within the device is faster than the same over the link, or events do not wait."""
    link, memory = link_rate(64 * MIB), device_rate(64 * MIB)
    assert 1e9 < link.rate < memory.rate < 1e14


@pytest.mark.gpu
def test_large_copies_are_faster_than_small_ones_and_the_kernel_is_near_the_engine() -> None:
    """The best of several measurements: whoever else uses the link makes single rates meaningless."""
    sizes = [64 << 10, MIB, 16 * MIB, 256 * MIB]
    best = [[0.0] * len(sizes), [0.0] * len(sizes)]

    def as_expected() -> bool:
        rising = all(
            1.5 * found[0] < found[-1] and all(small < 1.5 * large for small, large in itertools.pairwise(found))
            for found in best
        )
        return rising and 0.3 < best[1][-1] / best[0][-1] < 2

    for _ in range(10):
        for found, rates in zip(best, (link_rates(sizes), kernel_rates(sizes)), strict=True):
            found[:] = [max(one, rate.rate) for one, rate in zip(found, rates, strict=True)]
        if as_expected():
            break
        time.sleep(1)
    assert as_expected(), best
