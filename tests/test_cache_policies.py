"""Every cache policy and uneven quotas, from a profile through the plan to both engines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeflow
from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.offload.policy import Rule
from moeflow.offload.trace import Trace, load_trace, save_trace
from moeflow.pipeline import _plan_for, read_profile, seen_from
from moeflow.planning.replay import replay
from moeflow.schema import Plan, Profile
from moeflow.schema.profile import Cache

emulator = pytest.importorskip("emulator.launcher")

LAYERS, EXPERTS, TOP_K = 4, 8, 2
QUIET = {"prefetch_depth": 0, "context_length": 128}


def skewed() -> np.ndarray[Any, np.dtype[np.int16]]:
    """[300, 4, 2]: the first layer uses experts 6 and 7 alone, the last all."""
    used = [2, 4, 6, 8]
    rows = [[np.random.choice(np.arange(EXPERTS - n, EXPERTS), 2, replace=False) for n in used] for _ in range(300)]
    return np.array(rows, np.int16)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "skewed.npz"
    save_trace(path, Trace(skewed(), EXPERTS, "tiny"))
    return path


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory: Callable[..., Path]) -> Path:
    return checkpoint_factory(layers=LAYERS)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed by a profile in a file, which names the trace as it sees it."""
    place = tmp_path_factory.mktemp("policies")
    shutil.copy(trace, place / "mine.npz")
    cache = Cache(policy="static", trace="mine.npz")
    Profile(model=str(checkpoint), hardware="cpu-2-cores", cache=cache).save(place / "p.yaml")
    made = moeflow.pack(place / "p.yaml", place / "artifact")
    (place / "mine.npz").unlink()
    return Path(shutil.move(made, place / "elsewhere"))


SETTINGS: list[dict[str, Any]] = [
    {"policy": "lru"},
    {"policy": "mix", "half_life": 5},
    {"policy": "static"},
    {"policy": "mix", "experts_per_layer": 3},
    {"policy": "static", "experts_per_layer": 3},
    {"policy": "static", "experts_per_layer": 0},
]


def ids(count: int) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    found: list[int] = torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def test_an_artifact_carries_its_trace(artifact: Path) -> None:
    plan = moeflow.pipeline.plan_offload(artifact, {}, save=False)
    assert plan == Plan.load(artifact / "plan.json")
    assert plan.cache_slots[0] < plan.cache_slots[3]
    assert set(plan.hot_experts[0][:2]) == {6, 7}
    assert [len(hot) for hot in plan.hot_experts] == list(plan.cache_slots)


def test_paths_of_traces_are_the_profiles_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    Profile(model="demo", cache=Cache(trace="../t.npz")).save(tmp_path / "p" / "p.yaml")
    read = read_profile("p/p.yaml")
    assert read.cache.trace is not None
    assert Path(read.cache.trace).resolve() == (tmp_path / "t.npz").resolve()
    assert seen_from(Path("q"), read).cache.trace == "../t.npz"


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_host_hits_what_the_replay_hits_and_changes_no_bit(
    artifact: Path, setting: dict[str, Any], tmp_path: Path
) -> None:
    from moeflow.recording import recording

    prompt = ids(20)
    with moeflow.load(artifact, policy="lfu", experts_per_layer=EXPERTS, **QUIET) as engine:
        expected = engine.logits(prompt, chunk=1)
    with moeflow.load(artifact, record_routes=True, **QUIET, **setting) as engine:
        plan = engine.plan
        with recording(engine, tmp_path / "t.npz"):
            assert torch.equal(engine.logits(prompt, chunk=1), expected)
        host = engine.traffic
    routes = load_trace(tmp_path / "t.npz").routes
    rule = Rule(plan.policy, plan.half_life, plan.hot_experts)
    assert host.hits == sum(replay(routes, rule, plan.cache_slots))
    in_place = not any(plan.cache_slots)  # and never asked for
    assert host.uses == (0 if in_place else routes.size) and (host.computed_bytes > 0) == in_place


@pytest.mark.skipif(not emulator.available(), reason="no g++")
@pytest.mark.parametrize("setting", SETTINGS[1:3], ids=str)
def test_the_device_hits_what_the_replay_hits(artifact: Path, setting: dict[str, Any], tmp_path: Path) -> None:
    """Token by token, and after a prompt that was streamed the cache holds whom the policy may keep."""
    from moeflow.recording import recording

    opened = Artifact.open(artifact)
    plan = _plan_for(opened, {"execution": "device", **QUIET, **setting})
    assert len(set(plan.cache_slots)) > 1
    with Engine(opened, plan, launcher=emulator.EmulatedLauncher(), record_routes=True) as engine:
        assert engine.execution == "device-driven", engine.fallback
        with recording(engine, tmp_path / "t.npz"):
            engine.logits(ids(20), chunk=1)
        routes = load_trace(tmp_path / "t.npz").routes
        rule = Rule(plan.policy, plan.half_life, plan.hot_experts)
        assert engine.traffic.hits == sum(replay(routes, rule, plan.cache_slots))
        engine.empty_cache()
        with recording(engine, tmp_path / "prompt.npz"):
            engine.logits(ids(40))
        used = load_trace(tmp_path / "prompt.npz").routes
        for layer, kept in enumerate(engine._execution._cache.residents()):  # type: ignore[attr-defined]
            assert len(kept) <= plan.cache_slots[layer]
            if plan.hot_experts:
                assert set(kept) == set(plan.hot_experts[layer]) & set(used[:, layer].flatten().tolist())
