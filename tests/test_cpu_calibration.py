"""The CPU's kernels in a machine's file: what was measured, by whom, and a remark where nothing could be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moeflow import cpu_calibration
from moeflow.cpu_calibration import SCHEMES, calibrated_cpu
from moeflow.errors import DeviceError
from moeflow.planning.cpu_rates import FORMATS
from moeflow.planning.rates import format_of
from moeflow.probe import cpu_kernels
from moeflow.probe.match import find_hardware
from moeflow.probe.measurement import Measurement
from moeflow.schema import HardwareProfile, JointRates

GB = 10**9


class FakeCrew:
    """Started with so many threads; measured figures are the fixture's."""

    started: ClassVar[list[int]] = []
    closed: ClassVar[list[int]] = []

    def __init__(self, threads: int):
        self.threads = threads
        self.started.append(threads)

    def run(self, _: Sequence[Any]) -> None:
        raise AssertionError("nothing is measured here")

    def close(self) -> None:
        self.closed.append(self.threads)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every measurement replaced; what it was asked for is in the keys."""
    asked: dict[str, Any] = {"joint": (69.004e9, 43e9)}

    def products(matrices: dict[str, Any], workers: FakeCrew, pool: int, _: object) -> dict[str, Measurement]:
        asked.update(matrices=matrices, pool=pool, threads=workers.threads)
        return {"2-bit": Measurement(80.0049e9, 0.0123), "4-bit": Measurement(79e9, 0.04)}

    def joint(matrix: Any, _workers: FakeCrew, _pool: int, _: object) -> tuple[float, float] | None:
        asked["beside"] = matrix.scheme.label
        if isinstance(asked["joint"], Exception):
            raise asked["joint"]
        return asked["joint"]

    monkeypatch.setattr(cpu_kernels, "numbers", lambda nbytes: nbytes)
    monkeypatch.setattr(cpu_kernels, "product_rates", products)
    monkeypatch.setattr(cpu_kernels, "joint_rates", joint)
    monkeypatch.setattr(cpu_calibration, "best_level", lambda: 3)
    FakeCrew.started.clear()
    FakeCrew.closed.clear()
    return asked


def test_products_of_every_format_are_measured_by_the_threads_of_plans(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    found = calibrated_cpu(find_hardware("h100-80gb"), crew=FakeCrew)
    kernels = found.cpu.kernels
    assert kernels and kernels.level == "vnni" and kernels.threads == 15
    assert kernels.products == {"2-bit": 80 * GB, "4-bit": 79 * GB}
    assert kernels.joint == JointRates(cpu=69 * GB, link=43 * GB)
    assert (FakeCrew.started, FakeCrew.closed) == ([15], [15])
    assert list(measured["matrices"]) == [format_of(scheme) for scheme in SCHEMES]
    assert set(measured["matrices"]) <= FORMATS
    assert measured["pool"] == cpu_kernels.POOL and measured["beside"] == "2-bit g64"
    assert found.source("cpu.kernels").startswith("measured, moeflow probe, products over 3072 MiB by 15 ")
    assert found.spreads["cpu.kernels"] == 0.04
    found.save(tmp_path / "h.yaml")
    assert HardwareProfile.load(tmp_path / "h.yaml") == found
    assert "69GB/s" in (tmp_path / "h.yaml").read_text()


def test_without_a_gpu_all_cores_multiply_and_nothing_is_beside(measured: dict[str, Any]) -> None:
    small = find_hardware("cpu-2-cores").model_copy(update={"ram": 8 << 30})
    found = calibrated_cpu(small, crew=FakeCrew)
    assert found.cpu.kernels and found.cpu.kernels.joint is None and found.cpu.kernels.threads == 2
    assert "beside" not in measured and measured["pool"] == 512 << 20
    assert found.description == small.description


@pytest.mark.parametrize(
    ("joint", "said"),
    [
        (None, "CPU and link at once are not measured: the CPU's products take too long"),
        (
            DeviceError("copy.cu does not compile: /some/where"),
            "CPU and link at once are not measured: copy.cu does not",
        ),
    ],
)
def test_rates_at_once_that_cannot_be_are_left_out_and_said(measured: dict[str, Any], joint: Any, said: str) -> None:
    measured["joint"] = joint
    found = calibrated_cpu(find_hardware("h100-80gb"), crew=FakeCrew)
    assert found.cpu.kernels and found.cpu.kernels.joint is None
    assert said in found.description and "/some/where" not in found.to_yaml()


@pytest.mark.usefixtures("measured")
def test_an_installation_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise DeviceError("CPU kernels are off: /some/where/_cpu.so is not there; reinstall with a C++ compiler")

    before = find_hardware("h100-80gb")
    for starts in (none, FakeCrew):
        monkeypatch.setattr(cpu_kernels, "product_rates", none)
        found = calibrated_cpu(before, crew=starts)
        assert found.cpu == before.cpu and found.sources == before.sources
        assert found.description.endswith("; the CPU's kernels are not measured: CPU kernels are off")
    assert FakeCrew.closed == [15], "threads end whatever happens"
    monkeypatch.setattr(cpu_kernels, "product_rates", lambda *_: {})
    assert "there is none for any format" in calibrated_cpu(before, crew=FakeCrew).description


@pytest.mark.usefixtures("measured")
def test_hardware_shows_them(
    moe: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeflow import console

    monkeypatch.setattr(console.out, "_width", 300)
    found = calibrated_cpu(find_hardware("h100-80gb"), crew=FakeCrew)
    file = tmp_path / "mine.yaml"
    found.save(file)
    code, out, _ = moe("hardware", "show", str(file))
    assert code == 0
    assert "vnni, 15 threads: 2-bit 80 GB/s, 4-bit 79 GB/s, beside copies 69 GB/s and 43 GB/s" in " ".join(out.split())


@pytest.mark.usefixtures("measured")
def test_the_probe_shows_them_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from moeflow.console_hardware import show_cpu_kernels

    show_cpu_kernels(calibrated_cpu(find_hardware("h100-80gb"), crew=FakeCrew), Console(width=120))
    out = capsys.readouterr().out
    assert "CPU kernels: 15 threads, vnni" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["2-bit", "80", "GB/s", "0.72"] in rows and ["beside", "copies", "69", "GB/s"] in rows
    show_cpu_kernels(find_hardware("rtx-4090"), Console(width=120))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "measures"), [("h100-80gb", True), ("cpu-2-cores", False)])
def test_hardware_auto_measures_them_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str, measures: bool) -> None:
    """Plans share misses by what was measured; without a GPU they do not depend on it."""
    from moeflow import pipeline

    asked: list[HardwareProfile] = []
    monkeypatch.setattr(pipeline, "probe", lambda: find_hardware(name))
    monkeypatch.setattr(cpu_calibration, "calibrated_cpu", lambda found: asked.append(found) or found)
    assert pipeline.resolve_hardware("auto") == find_hardware(name)
    assert asked == ([find_hardware(name)] if measures else [])
    pipeline.resolve_hardware(name)
    assert len(asked) == measures
