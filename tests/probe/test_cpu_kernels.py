"""The CPU's products as the probe times them: all matrices of a pool by all threads, and only what has a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from moeflow.artifact.layout import packed_matrix
from moeflow.errors import DeviceError
from moeflow.kernels.cpu import Job, best_level
from moeflow.probe import cpu_kernels
from moeflow.probe.cpu_kernels import numbers, passes_during, product_rates
from moeflow.schema import HqqScheme, PackedMatrix

POOL = 1 << 20


def matrix(bits: int) -> PackedMatrix:
    return packed_matrix("m", 128, 512, HqqScheme(bits=bits, group_size=64), "bfloat16")


class FakeGemv:
    """Has a kernel for all but 3 bits; jobs are the blobs that they read."""

    def __init__(self, matrix: PackedMatrix):
        if "3-bit" in matrix.scheme.label:
            raise DeviceError("no CPU kernel multiplies 3-bit g64 with 2 planes at level portable")

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (1, 512)
        return x

    def job(self, blob: torch.Tensor, _x: object, out: torch.Tensor) -> torch.Tensor:
        assert out.shape == (1, 128)
        return blob


class Worker:
    def __init__(self) -> None:
        self.runs: list[Sequence[Any]] = []

    def run(self, jobs: Sequence[Any]) -> None:
        self.runs.append(jobs)


def test_all_matrices_of_the_pool_are_multiplied_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "CpuGemv", FakeGemv)
    monkeypatch.setattr(cpu_kernels.time, "perf_counter", _clock(0.25))
    worker = Worker()
    found = product_rates({"4-bit": matrix(4), "3-bit": matrix(3), "2-bit": matrix(2)}, worker, numbers(POOL))
    assert list(found) == ["4-bit", "2-bit"], "those that have a kernel"
    for name, four in (("4-bit", True), ("2-bit", False)):
        own = sum(s.nbytes for s in matrix(4 if four else 2).segments)
        each = -(-max(s.offset + s.nbytes for s in matrix(4 if four else 2).segments) // 4096) * 4096
        assert found[name].rate == pytest.approx(POOL // each * own / 0.25)
    blobs = torch.stack(list(worker.runs[0]))
    assert blobs.nbytes <= POOL < blobs.nbytes + blobs[0].nbytes
    assert len({blob.data_ptr() for blob in worker.runs[0]}) == len(worker.runs[0]), "each is read once"
    halves = blobs.view(torch.float16)
    assert halves.isfinite().all() and (halves.abs() >= torch.finfo(torch.float16).tiny).all()
    assert (blobs.view(torch.float32).abs() >= torch.finfo(torch.float32).tiny).all()


def test_without_the_library_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: PackedMatrix) -> None:
        raise DeviceError("CPU kernels are off: there is no library; reinstall with a C++ compiler (g++ or clang++)")

    monkeypatch.setattr(cpu_kernels, "CpuGemv", missing)
    with pytest.raises(DeviceError, match="CPU kernels are off"):
        product_rates({"4-bit": matrix(4)}, Worker(), numbers(POOL))


def test_passes_count_while_the_other_side_is_busy() -> None:
    times, busy = iter([0.5, 0.25, 1.0, 9.0]), iter([True, True, True, False])
    assert passes_during(lambda: next(times), lambda: next(busy)) == (3, 1.75)
    assert passes_during(lambda: 1.0, lambda: False) == (0, 0.0)


def test_the_real_kernels_have_a_rate() -> None:
    try:
        best_level()
    except DeviceError as error:
        pytest.skip(str(error))
    from moeflow.kernels.cpu import CpuGemv

    class Alone:
        def run(self, jobs: Sequence[Job]) -> None:
            for job in jobs:
                gemv.run(job)

    gemv = CpuGemv(matrix(4))
    found = product_rates({"4-bit": matrix(4)}, Alone(), numbers(POOL))
    assert 1e7 < found["4-bit"].rate < 1e13


def _clock(step: float) -> Any:
    """Each reading is `step` later than the last."""

    def readings() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += step

    found = readings()
    return lambda: next(found)
