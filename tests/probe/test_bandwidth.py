"""Rates count the right bytes and keep to the right order; how fast this machine is, is not tested."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeflow.errors import DeviceError, StorageError
from moeflow.probe import bandwidth, disk
from moeflow.probe.bandwidth import copy_rate, device_rate, link_rate, read_rate
from moeflow.probe.disk import disk_rate

MIB = 1 << 20


def tick(monkeypatch: pytest.MonkeyPatch, module: object, seconds: list[float]) -> None:
    """Let the clock of `module` go on by these seconds between one look and the next, then by the last of them."""
    steps = itertools.chain([0.0], seconds, itertools.repeat(seconds[-1]))
    clock = itertools.accumulate(steps)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))  # type: ignore[attr-defined]


@pytest.mark.parametrize("measure", [copy_rate, read_rate])
def test_a_real_measurement_gives_a_rate(measure: Callable[[int], float]) -> None:
    assert 0 < measure(4 * MIB) < 1e14


@pytest.mark.parametrize(("measure", "moved"), [(copy_rate, 1), (read_rate, 2)])
def test_bytes_are_counted(monkeypatch: pytest.MonkeyPatch, measure: Callable[[int], float], moved: int) -> None:
    """Every pass takes half a second by the clock: the rate is twice the bytes, and follows them."""
    tick(monkeypatch, bandwidth, [0.5])
    assert measure(MIB) == pytest.approx(moved * 2 * MIB)
    assert measure(3 * MIB) == pytest.approx(moved * 6 * MIB)


def test_the_median_counts_and_the_first_pass_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = [100.0, 0.25, 1.0, 0.5, 50.0, 0.25]  # the first is the warm-up; the median of the others is 0.5
    tick(monkeypatch, bandwidth, [step for seconds in passes for step in (seconds, 7.0)])
    assert copy_rate(MIB) == pytest.approx(2 * MIB)


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
    copy_rate(MIB, lambda *report: told.append(report))
    assert [done for _, done, _ in told] == [MIB * n for n in range(1, bandwidth.REPEATS + 1)]
    assert {total for _, _, total in told} == {MIB * bandwidth.REPEATS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers")
@pytest.mark.parametrize("measure", [link_rate, device_rate])
def test_a_gpu_that_refuses_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, measure: Callable[[int], float]
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


def test_the_link_is_timed_by_events_around_a_pinned_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    assert link_rate(MIB) == pytest.approx(100 * MIB)
    one = ["record", "copy True", "record", "synchronize", "elapsed"]
    assert cuda.calls[:2] == ["pin_memory True", "device cuda:0"]
    assert cuda.calls[2:] == one * (1 + bandwidth.REPEATS) + ["release device", "release host"]


def test_device_memory_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    assert device_rate(MIB) == pytest.approx(200 * MIB)
    assert "pin_memory True" not in cuda.calls
    assert cuda.calls.count("synchronize") == 1 + bandwidth.REPEATS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rates_of_a_real_gpu_follow_the_bytes_they_count() -> None:
    """One buffer's copy within the device is faster than the same over the link, or events do not wait."""
    link, memory = link_rate(64 * MIB), device_rate(64 * MIB)
    assert 1e9 < link < memory < 1e14


class Calls:
    """Records what is asked of the file, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.names: list[str] = []
        for name in ("pwrite", "fdatasync", "posix_fadvise", "preadv"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if name == "posix_fadvise":
                assert arguments[1:] == (0, 0, os.POSIX_FADV_DONTNEED)
            self.names.append(name)
            return function(*arguments)

        return call


def test_the_disk_is_read_after_the_cache_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    told: list[tuple[str, int, int]] = []
    assert disk_rate(tmp_path, lambda *report: told.append(report), 2 * disk.CHUNK) > 0
    assert calls.names == ["pwrite", "fdatasync"] * 2 + ["posix_fadvise", "preadv", "preadv"]
    assert [(done, total) for _, done, total in told] == [(disk.CHUNK * n, disk.CHUNK * 2) for n in (1, 2)]


def test_bytes_of_the_disk_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # looks at the clock: the start, one before the second chunk is written; the start, one after each chunk read
    tick(monkeypatch, disk, [0.1, 9.0, 0.25, 0.25])
    assert disk_rate(tmp_path, nbytes=2 * disk.CHUNK) == pytest.approx(4 * disk.CHUNK)


def test_a_slow_disk_ends_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    tick(monkeypatch, disk, [10.0])
    assert disk_rate(tmp_path, nbytes=100 * disk.CHUNK) == pytest.approx(disk.CHUNK / 10)
    assert calls.names.count("pwrite") == calls.names.count("preadv") == 1


def test_slow_reads_end_it_too_and_only_what_was_read_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    # looks at the clock: the start, before the second and third chunk written; the start, after each chunk read
    tick(monkeypatch, disk, [0.0, 0.0, 0.0, 1.5])
    assert disk_rate(tmp_path, nbytes=3 * disk.CHUNK) == pytest.approx(2 * disk.CHUNK / 3)
    assert (calls.names.count("pwrite"), calls.names.count("preadv")) == (3, 2)


def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Path]] = []
    really = os.preadv

    def look(*arguments: object) -> int:
        seen.append(list(tmp_path.iterdir()))
        return really(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", look)
    disk_rate(tmp_path, nbytes=1)
    assert seen == [[]]  # not even while it is read
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere: cannot measure the disk: no such file or directory"):
        disk_rate(tmp_path / "nowhere")
