"""Passes of two to eight tokens on the device-driven path: a graph for each number, made amid a sequence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device_engine import assert_near, random_ids

from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.model.step import DecodeStep
from moeflow.offload.trace import load_trace
from moeflow.pipeline import _plan_for
from moeflow.recording import recording

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

EXPERTS, GUESSES = 8, 2


def load(artifact: Path, landing: int = EXPERTS, record_routes: bool = False, **overrides: object) -> Engine:
    opened = Artifact.open(artifact)
    plan = _plan_for(opened, {"execution": "device", "context_length": 128, "experts_per_layer": 3, **overrides})
    plan = plan.model_copy(update={"staging_slots": landing + GUESSES})
    engine = Engine(opened, plan, launcher=emulator.EmulatedLauncher("random"), record_routes=record_routes)
    assert engine.execution == "device-driven", engine.fallback
    engine.logits([1])  # allocates the KV cache, as the capture of one token does; a first pass is computed otherwise
    return engine


@pytest.fixture
def engine(tiny_artifact: Path) -> Iterator[Engine]:
    with load(tiny_artifact) as engine:
        yield engine


class Graph:
    """Replays by computing; `stuck` ones forget where they are."""

    def __init__(self, step: DecodeStep, stuck: bool = False):
        self.step, self.stuck, self.replays = step, stuck, 0

    def replay(self) -> None:
        self.replays += 1
        if self.stuck:
            self.step._begin()
            self.step._position.copy_(self.step._offsets)
        self.step._logits = self.step._pass()


def capturing(engine: Engine, monkeypatch: pytest.MonkeyPatch, stuck: bool = False) -> list[int]:
    """Let the engine capture as on CUDA; returns the numbers of tokens as they are recorded."""
    recorded: list[int] = []

    def record(step: Any, beside: DecodeStep | None = None) -> None:
        assert beside is not None
        recorded.append(step._tokens.shape[1])
        step._graph = Graph(step, stuck)

    monkeypatch.setattr(DecodeStep, "record", record)
    monkeypatch.setattr(engine._execution.steps, "_captures", True)
    return recorded


def test_a_few_tokens_at_once_are_as_one_by_one(engine: Engine) -> None:
    ids = random_ids(18)
    expected = engine.logits(ids, chunk=1)
    assert engine._execution.steps.most == 8
    before = engine.traffic
    for chunk in (2, 3, 5, 7, 8):
        assert_near(engine.logits(ids, chunk=chunk), expected)
    after = engine.traffic
    assert after.streamed_bytes == before.streamed_bytes and after.hits > before.hits
    assert_near(engine.logits(ids, chunk=9), expected)
    assert engine.traffic.streamed_bytes > after.streamed_bytes


@pytest.mark.parametrize(("landing", "most"), [(2, 1), (4, 2), (7, 3), (8, 8)])
def test_only_what_the_landing_buffers_hold_goes_together(tiny_artifact: Path, landing: int, most: int) -> None:
    ids = random_ids(16)
    with load(tiny_artifact, landing) as engine:
        assert engine._execution.steps.most == most
        expected = engine.logits(ids, chunk=1)
        for chunk in (most, most + 1):
            assert_near(engine.logits(ids, chunk=chunk), expected)


def test_graphs_are_made_once_and_change_nothing(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(40)
    lengths = [3, 1, 8, 3, 1, 1, 2, 3, 8, 2]
    found = []
    for captures in (False, True):
        with load(tiny_artifact) as engine:
            recorded = capturing(engine, monkeypatch) if captures else []
            cache, at, rows = engine.new_cache(), 0, []
            for length in lengths:
                rows.append(engine.forward(ids[at : at + length], cache))
                at += length
            steps = engine._execution.steps
            assert recorded == ([3, 8, 2] if captures else []) and not steps.kept
            graphs = {n: step._graph.replays for n, step in steps._steps.items() if step._graph is not None}
            assert graphs == ({3: 4, 8: 3, 2: 3} if captures else {})  # two to check, then one each
            found.append((torch.cat(rows), engine.traffic.uses))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]  # passes beside the sequence are not counted


@pytest.mark.parametrize("stuck", [False, True])
def test_passes_beside_the_sequence_are_not_recorded(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: bool
) -> None:
    """A graph that is made, or turns out wrong, in the middle of a recording."""
    ids, found = random_ids(18), []
    for captures in (False, True):
        with load(tiny_artifact, record_routes=True) as engine:
            recorded = capturing(engine, monkeypatch, stuck) if captures else []
            with recording(engine, tmp_path / "a.npz"):
                cache = engine.new_cache()
                for at in range(0, 18, 3):
                    engine.forward(ids[at : at + 3], cache)
            assert recorded == [3] * captures and bool(engine._execution.steps.kept) == (captures and stuck)
            found.append(load_trace(tmp_path / "a.npz").routes)
    assert found[0].shape[0] == 18 and (found[0] == found[1]).all()


def test_a_conversation_with_graphs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turns are short: what stands in the cache before a graph is made is not disturbed."""
    turns, said = [random_ids(5), random_ids(4), random_ids(5), random_ids(4)], list[int]()
    expected = []
    for turn in turns:
        said += turn
        expected.append(engine.generate(said, max_new_tokens=4, temperature=0).ids)
        said += expected[-1]
    recorded, session, said = capturing(engine, monkeypatch), engine.session(), []
    for turn, answer in zip(turns, expected, strict=True):
        said += turn
        assert engine.generate(said, max_new_tokens=4, temperature=0, session=session).ids == answer
        said += answer
    assert recorded


@pytest.mark.parametrize("fault", ["refused", "stuck"])
def test_what_cannot_be_captured_runs_without_a_graph(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    ids = random_ids(15)
    expected = engine.logits(ids, chunk=3)
    recorded = capturing(engine, monkeypatch, stuck=True)
    if fault == "refused":

        def refuse(step: Any, **_: object) -> None:
            recorded.append(step._tokens.shape[1])
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(DecodeStep, "record", refuse)
    assert torch.equal(engine.logits(ids, chunk=3), expected)
    assert recorded == [3]
    reason = {"refused": "not permitted", "stuck": r"differs from the one it was made of by .* at token 3"}[fault]
    assert list(engine._execution.steps.kept) == [3]
    assert re.search(reason, engine._execution.steps.kept[3])
    assert torch.equal(engine.logits(ids, chunk=3), expected)
    assert recorded == [3]


def test_without_room_to_check_a_graph_waits(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(9)
    with load(tiny_artifact, context_length=9) as engine:
        recorded, cache = capturing(engine, monkeypatch), engine.new_cache()
        engine.forward(ids[:5], cache)  # five tokens and five more would not fit; four and four behind them neither
        engine.forward(ids[5:], cache)
        assert recorded == []
        engine.forward(ids[:4], engine.new_cache())
        assert recorded == [4]


def test_an_interrupted_capture_is_tried_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(12)
    expected = engine.logits(ids, chunk=4)
    recorded = capturing(engine, monkeypatch)
    compare = DecodeStep.compare

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DecodeStep, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.logits(ids, chunk=4)
    monkeypatch.setattr(DecodeStep, "compare", staticmethod(compare))
    assert torch.equal(engine.logits(ids, chunk=4), expected)
    assert recorded == [4, 4] and not engine._execution.steps.kept
