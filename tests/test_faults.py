"""What goes wrong in use: said with its numbers and its remedy, or survived by the other path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import dequantized_model, logits_of

import moeflow
from moeflow import assembly
from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.errors import ArtifactError
from moeflow.kernels.launcher import cuda_launcher
from moeflow.model.memory import refusal
from moeflow.model.steps import Steps
from moeflow.pipeline import _plan_for
from moeflow.schema import Plan
from moeflow.schema.units import format_size

GIB = 1 << 30
IDS = [5, 17, 40, 3, 66, 21, 90, 8]


@pytest.fixture
def emulated() -> Callable[[], object]:
    emulator = pytest.importorskip("emulator.launcher")
    if not emulator.available():
        pytest.skip("no g++")
    return emulator.EmulatedLauncher


def device_plan(artifact: Artifact, **overrides: object) -> Plan:
    return _plan_for(artifact, {"execution": "device", "context_length": 64, "experts_per_layer": 3, **overrides})


def assert_serves(engine: Engine) -> None:
    """It is the model, whichever way it went."""
    expected = logits_of(dequantized_model(engine.artifact.directory), IDS)
    assert (engine.logits(IDS, chunk=1) - expected).abs().max() <= 1e-3 * expected.abs().max()


# -- the other path is taken, and says why --------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_too_few_buffers_for_one_steps_experts(tiny_artifact: Path, emulated: Callable[[], object], slots: int) -> None:
    opened = Artifact.open(tiny_artifact)
    plan = device_plan(opened).model_copy(update={"staging_slots": slots})
    with Engine(opened, plan, launcher=emulated()) as engine:  # type: ignore[arg-type]
        assert engine.fallback == (f"host-driven instead of device-driven: {slots} landing buffers; one step needs 4")
        assert engine.execution == "host-driven" and engine.note == engine.fallback
        assert_serves(engine)


def test_a_gpu_that_the_kernels_do_not_support(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(assembly, "_device_execution", lambda _: cuda_launcher(torch.device("cuda", 0)))
    opened = Artifact.open(tiny_artifact)
    with Engine(opened, device_plan(opened)) as engine:
        assert engine.fallback is not None
        assert engine.fallback.startswith("host-driven instead of device-driven: ")
        assert "V100 has compute capability 7.0" in engine.fallback and "7.5" in engine.fallback
        assert_serves(engine)


def test_a_step_that_cannot_be_captured(
    tiny_artifact: Path, emulated: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Steps) -> None:
        raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")

    monkeypatch.setattr(Steps, "capture", refuse)
    opened = Artifact.open(tiny_artifact)
    with Engine(opened, device_plan(opened), launcher=emulated()) as engine:  # type: ignore[arg-type]
        assert engine.fallback == (
            "host-driven instead of device-driven: Cannot copy between CPU and CUDA tensors during CUDA graph capture"
        )
        assert_serves(engine)


# -- device memory --------------------------------------------------------------------------------------------


def cuda_with(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 12 * GIB))


@pytest.mark.parametrize(
    ("short", "fitting"), [(0.5, "3 would fit"), (1.0, "3 would fit"), (1.1, "2 would fit"), (4.5, "not even 0 would")]
)
def test_refused_device_memory_says_planned_free_and_the_k_that_fits(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, short: float, fitting: str
) -> None:
    plan = _plan_for(Artifact.open(tiny_artifact), {"experts_per_layer": 4})
    free = plan.memory.total - int(short * plan.memory.slots / 4)
    cuda_with(monkeypatch, free)
    said = refusal(plan)
    assert f"takes {format_size(plan.memory.total)}, {format_size(free)} free now" in said
    assert f"{format_size(plan.memory.slots)} for 4 experts per layer, of which {fitting}" in said
    assert "lower memory.vram, cache.experts_per_layer or context_length" in said
    held = plan.memory.total - free  # what this process has itself is not missing
    assert "would fit" not in refusal(plan, held)


# -- damaged numbers ------------------------------------------------------------------------------------------


def spoil(file: Path, offset: int) -> None:
    """A bfloat16 or float16 NaN where a scale was."""
    content = bytearray(file.read_bytes())
    content[offset : offset + 2] = b"\xff\x7f"
    file.write_bytes(content)


def expert_scale(artifact: Artifact, layer: int, expert: int) -> int:
    """Where the last scale of an expert's down projection lies in its shard."""
    matrix = artifact.manifest.layout_of(layer).matrices[1]
    scales = next(s for s in matrix.segments if s.part == "scales")
    return artifact.blob_offset(layer, expert) + scales.offset + scales.nbytes - 4


def test_a_packed_scale_that_is_no_number_is_refused_at_load(own_artifact: Path) -> None:
    artifact = Artifact.open(own_artifact)
    spoil(artifact.shard_path(1), expert_scale(artifact, 1, 6))
    with pytest.raises(ArtifactError, match=r"layer 1, expert 6 is damaged .*--overwrite"):
        moeflow.load(own_artifact)


def test_and_when_it_is_first_read_where_it_stays_on_disk(own_artifact: Path) -> None:
    artifact = Artifact.open(own_artifact)
    spoil(artifact.shard_path(1), expert_scale(artifact, 1, 6))
    with moeflow.load(own_artifact, ram=0) as engine:
        with pytest.raises(ArtifactError, match="layer 1, expert 6 is damaged"):
            engine.logits(list(range(90)))
        with pytest.raises(ArtifactError, match="layer 1, expert 6 is damaged"):
            engine.logits(list(range(90)))


def test_a_resident_scale_that_is_no_number_is_refused_at_load(own_artifact: Path) -> None:
    artifact = Artifact.open(own_artifact)
    header = artifact.resident_header()
    name = next(n for n in header.tensors if n.endswith(".scales"))
    file = own_artifact / artifact.manifest.resident_shard
    spoil(file, header.tensors[name].offset)
    with pytest.raises(ArtifactError, match=rf"{file.name}: damaged .*--overwrite"):
        moeflow.load(own_artifact)


# -- Ctrl-C ---------------------------------------------------------------------------------------------------


def test_ctrl_c_while_generating_ends_cleanly_and_leaves_the_artifact_whole(own_artifact: Path) -> None:
    arguments = ["-m", "moeflow", "generate", str(own_artifact), "-p", "abc", "-n", "200", "--temperature", "1"]
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert list(Artifact.open(own_artifact).verify()) == []
    assert not [p for p in own_artifact.rglob("*") if p.suffix in (".tmp", ".part")]
    assert json.loads((own_artifact / "manifest.json").read_text())
