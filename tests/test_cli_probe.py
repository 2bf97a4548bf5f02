"""`moeflow probe` as a person and as a script use it, on whatever machine runs the tests, with small buffers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from probe.test_nvml import BOARDS, FakeDriver

from moeflow import cli_probe, cpu_calibration
from moeflow.probe import bandwidth, cpu_kernels, disk
from moeflow.probe.match import find_hardware
from moeflow.schema import HardwareProfile

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moe(moe: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`moe(*arguments)` in this process and in a directory of its own: exit code, stdout, stderr."""
    monkeypatch.setattr(bandwidth, "BUFFER", 4 << 20)
    monkeypatch.setattr(disk, "LARGEST", 8 << 20)
    monkeypatch.setattr(cpu_kernels, "POOL", 4 << 20)
    monkeypatch.setattr(cpu_calibration, "SHAPE", (256, 512))
    monkeypatch.chdir(tmp_path)

    return moe


@pytest.mark.parametrize("option", ["--save", "--output", "-o"])
def test_a_saved_file_is_one_that_hardware_takes(moe: Run, option: str) -> None:
    code, out, _ = moe("probe", option, "mine.yaml", "--json")
    assert code == 0
    profile = HardwareProfile.load("mine.yaml")
    assert profile.to_dict() == json.loads(out)
    assert profile.name == "mine"
    assert moe("hardware", "validate", "mine.yaml")[:2] == (0, "mine.yaml: valid hardware profile\n")
    assert moe("hardware", "show", "mine.yaml")[0] == 0


def test_text_has_rates_with_spreads_and_what_changes_by_the_minute(moe: Run) -> None:
    code, out, _ = moe("probe")
    assert code == 0
    assert re.search(r"^link +[\d.,]+ GB/s \(spread [\d.]+%\)", out, re.MULTILINE)
    assert re.search(r"^64 KiB +[\d.,]+ GB/s \(spread", out, re.MULTILINE)
    assert re.search(r"^RAM +[\d.,]+ [MG]iB free *$", out, re.MULTILINE)
    assert "in random reads of 4 MiB" in out
    assert "link: copies within host memory" in out or "link: page-locked copies" in out
    assert list(Path().iterdir()) == []


def test_quick_measures_nothing_and_says_where_the_link_is_from(moe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("measured")

    for name in ("copy_rates", "link_rates", "kernel_rates", "read_rate", "device_rate"):
        monkeypatch.setattr(bandwidth, name, measured)
    code, out, _ = moe("probe", "--quick", "--save", "quick.yaml")
    assert code == 0
    assert "not measured" in " ".join(out.split())
    profile = HardwareProfile.load("quick.yaml")
    assert profile.origin == "derived"
    assert profile.source("link.host_to_device").startswith(("derived", "assumed"))
    assert profile.disk is None


def test_what_a_gpu_and_its_bus_are_at_now_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    FakeDriver(BOARDS[1:2]).install(monkeypatch)
    rows = dict(cli_probe._now(find_hardware("t4"), tmp_path))
    assert rows["GPU memory"] == "7.5 GiB free"
    assert rows["bus"] == "PCIe 1.0 x8 at rest"
    assert cli_probe._now(find_hardware("cpu-2-cores"), None)[-1] == (
        "disk", "left out: the current directory has no room or may not be written; name one by --disk"
    )  # fmt: skip


def test_an_artifacts_directory_is_preferred_and_a_small_disk_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli_probe._usual_directory() == Path()
    Path("artifacts").mkdir()
    assert cli_probe._usual_directory() == Path("artifacts")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cli_probe._usual_directory() is None
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_probe, "ROOM", 1 << 62)
    assert cli_probe._usual_directory() is None


def test_a_disk_that_is_not_there_is_an_error(moe: Run) -> None:
    code, _, err = moe("probe", "--disk", "nowhere")
    assert code == 7
    assert "nowhere: cannot measure the disk: no such file or directory" in err
