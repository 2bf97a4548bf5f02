"""A predictor's guesses and its policy in both engines: what they say is done, and no token changes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TOP_K

import moeflow
from moeflow.artifact.predictors import PREDICTOR, Matrices, load_predictor, router_digest, save_predictor
from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.errors import ArtifactError
from moeflow.learning.judgement import scores_of
from moeflow.model.learned import learned_guesser
from moeflow.offload.trace import load_trace
from moeflow.pipeline import _plan_for
from moeflow.planning.ranking import scored_hits
from moeflow.recording import recording
from moeflow.schema import PredictorCard

LAYERS, EXPERTS = 4, 8
SETTINGS = {"experts_per_layer": 3, "context_length": 128}
LEARNED = {"policy": "learned", "predictor": "learned"}


@pytest.fixture(scope="module")
def artifact(checkpoint_factory: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a predictor of random maps."""
    profile = {"model": str(checkpoint_factory(layers=LAYERS)), "hardware": "cpu-2-cores"}
    made = moeflow.pack(profile, tmp_path_factory.mktemp("learned") / "a")
    opened = Artifact.open(made)
    hidden = opened.manifest.layouts[0].matrices[0].columns
    card = PredictorCard(
        model="tiny", routers=router_digest(opened), hidden=hidden, experts=(EXPERTS,) * LAYERS, depth=2, reuse=0.5,
        tokens=1, held_out=0,
    )  # fmt: skip

    def random_map() -> torch.Tensor:
        return torch.randn(EXPERTS, hidden + 1)

    guess = [[random_map() if layer >= ahead else None for layer in range(LAYERS)] for ahead in (1, 2)]
    save_predictor(made / PREDICTOR, card, Matrices(guess, [random_map() for _ in range(LAYERS)]))
    return made


def hosted(artifact: Path, **settings: Any) -> Engine:
    return moeflow.load(artifact, record_routes=True, execution="host", **{**SETTINGS, **settings})


def emulated(artifact: Path, **settings: Any) -> Engine:
    emulator = pytest.importorskip("emulator.launcher")
    if not emulator.available():
        pytest.skip("no g++")
    opened = Artifact.open(artifact)
    plan = _plan_for(opened, {"execution": "device", **SETTINGS, **settings})
    engine = Engine(opened, plan, launcher=emulator.EmulatedLauncher(), record_routes=True)
    assert engine.execution == "device-driven", engine.fallback
    return engine


DRIVEN = pytest.mark.parametrize("load", [hosted, emulated])


def ids(count: int) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    found: list[int] = torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def spied(engine: Engine) -> list[np.ndarray[Any, Any]]:
    """What the engine's keeper says from now on: [E], layer after layer."""
    runner, said = engine._execution.runner, []
    keeper = runner.keeper
    assert keeper is not None

    def spy(layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        scores = keeper(layer, hidden_states)
        said.append(scores.numpy().copy())
        return scores

    runner.keeper = spy
    return said


@DRIVEN
def test_the_cache_keeps_what_is_said_to_come_and_no_bit_changes(
    load: Callable[..., Engine], artifact: Path, tmp_path: Path
) -> None:
    prompt = ids(24)
    with load(artifact, policy="lru", predictor="none") as engine:
        expected = engine.logits(prompt, chunk=1)
    with load(artifact, predictor="none", policy="learned") as engine:
        said = spied(engine)
        with recording(engine, tmp_path / "t.npz"):
            assert torch.equal(engine.logits(prompt, chunk=1), expected)
        hits = engine.traffic.hits
    routes = load_trace(tmp_path / "t.npz").routes
    scores = np.stack(said).reshape(len(prompt), LAYERS, EXPERTS)
    assert hits == scored_hits(routes, scores, 3).sum()


@DRIVEN
def test_text_is_the_same_with_guesses_and_policy_learned(load: Callable[..., Engine], artifact: Path) -> None:
    prompt = ids(30)
    with load(artifact, policy="lru", predictor="none") as engine:
        expected = engine.generate(prompt, max_new_tokens=16, temperature=0).ids
    for settings in (
        LEARNED,
        {**LEARNED, "prefetch_depth": 2} if load is hosted else {**LEARNED, "experts_per_layer": 1},
    ):
        with load(artifact, **settings) as engine:
            assert engine.guessing
            assert engine.generate(prompt, max_new_tokens=16, temperature=0).ids == expected
            assert engine.traffic.guesses


def test_guesses_are_the_greatest_scores(artifact: Path) -> None:
    _, matrices = load_predictor(Artifact.open(artifact))
    guesser = learned_guesser(matrices, 3, 2, torch.device("cpu"))
    states = torch.randn(5, matrices.keep[0].shape[1] - 1)
    for layer in range(LAYERS):
        found = guesser.guess(layer, states)
        assert len(found) == min(2, LAYERS - 1 - layer)
        for ahead, said in enumerate(found, start=1):
            matrix = matrices.guess[ahead - 1][layer + ahead]
            assert matrix is not None
            assert torch.equal(said, scores_of(matrix, states).topk(3, dim=1).indices)


def test_the_kernel_says_what_the_maps_say(artifact: Path) -> None:
    emulator = pytest.importorskip("emulator.launcher")
    if not emulator.available():
        pytest.skip("no g++")
    _, matrices = load_predictor(Artifact.open(artifact))
    with emulated(artifact, **LEARNED) as engine:
        runner = engine._execution.runner
        for layer in range(LAYERS):
            states = torch.randn(1, matrices.keep[0].shape[1] - 1)
            scores = scores_of(matrices.keep[layer], states)
            torch.testing.assert_close(runner.keeper(layer, states), scores[0], atol=1e-4, rtol=1e-4)
            for said in runner.predictor.guess(layer, states):
                assert said.shape == (1, TOP_K)


def test_a_plan_without_its_predictor_is_refused(artifact: Path, tiny_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="train-predictor"):
        moeflow.load(tiny_artifact, hardware="cpu-2-cores", policy="learned")
    with pytest.raises(ArtifactError, match="2 layers ahead, the plan 3"):
        hosted(artifact, predictor="learned", prefetch_depth=3)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 3, 5])
def test_on_a_gpu_text_is_the_same_and_hits_are_the_hosts(artifact: Path, k: int, tmp_path: Path) -> None:
    """Captured: maps, scores and victims are part of the graph."""
    prompt = ids(40)
    settings = {"hardware": "auto", "context_length": 128, "experts_per_layer": k, "dtype": "float32"}
    with moeflow.load(artifact, policy="lru", predictor="none", **settings) as engine:
        expected = engine.generate(prompt, max_new_tokens=48, temperature=0).ids
    with moeflow.load(artifact, **LEARNED, **settings) as engine:
        assert engine.execution == "device-driven" and engine.guessing
        for _ in range(2):
            assert engine.generate(prompt, max_new_tokens=48, temperature=0).ids == expected
        assert engine.traffic.guesses
    found = []
    for execution in ("device", "host"):
        changes = {**settings, "execution": execution, "policy": "learned", "predictor": "none"}
        with moeflow.load(artifact, record_routes=True, **changes) as engine:
            engine.empty_cache()
            with recording(engine, tmp_path / "t.npz"):
                engine.logits(prompt, chunk=1)
            found.append((engine.traffic.hits, load_trace(tmp_path / "t.npz").routes))
    assert np.mean(found[0][1] == found[1][1]) > 0.95  # routers of both round differently
    assert abs(found[0][0] - found[1][0]) <= 0.1 * found[1][0]
