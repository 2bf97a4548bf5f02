"""A predictor is what least squares says, its file its model's own, and it foresees texts like the one it saw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import moeflow
from moeflow.artifact.predictors import Matrices, load_predictor, save_predictor
from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.errors import ArtifactError, UsageError
from moeflow.learning.fitting import RIDGE, fit
from moeflow.learning.judgement import Judge, scores_of
from moeflow.learning.moments import TAIL, Moments
from moeflow.learning.training import train_predictor
from moeflow.offload.policy import LearnedPolicy
from moeflow.offload.predictor import next_gate
from moeflow.planning.ranking import scored_hits
from moeflow.schema import PredictorCard

LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 6, 2, 16
TEXT = " ".join(f"{verse} And the king said unto them, Go ye into the city." for verse in range(300))


def passes(seed: int, count: int = 4, tokens: int = 96) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states [T, L, H] and ids [T, L, K] that follow from them by a hidden map, with noise."""
    draw = torch.Generator().manual_seed(seed)
    own = torch.randn(LAYERS, HIDDEN, EXPERTS, generator=draw)
    found = []
    for _ in range(count):
        states = torch.randn(tokens, 1, HIDDEN, generator=draw) + 0.3 * torch.randn(
            tokens, LAYERS, HIDDEN, generator=draw
        )
        logits = torch.einsum("tlh,lhe->tle", states, own)
        found.append((states, logits.topk(TOP_K, dim=-1).indices))
    return found


def noted(found: list[tuple[torch.Tensor, torch.Tensor]], depth: int, reuse: float) -> Moments:
    moments = Moments([EXPERTS] * LAYERS, HIDDEN, depth, reuse, torch.device("cpu"))
    for states, index in found:
        for layer in range(LAYERS):
            moments.note(layer, states[:, layer], index[:, layer], index[:, layer].float())
        moments.end(len(states))
    return moments


def test_the_maps_are_those_of_least_squares_over_all_tokens() -> None:
    seed, reuse = random.randrange(1 << 32), 0.6
    print("seed", seed)
    found = passes(seed)
    moments = noted(found, 2, reuse)
    fitted = fit(moments)
    assert moments.tokens == sum(len(states) - TAIL for states, _ in found)
    for layer in range(LAYERS):
        rows, keep, guess = [], [], []
        for states, index in found:
            used = torch.zeros(*index.shape[:2], EXPERTS).scatter_(-1, index, 1.0)
            for token in range(len(states) - TAIL):
                rows.append(torch.cat([states[token, layer], torch.ones(1)]))
                after = used[token + 1 :, layer]
                keep.append(sum((1 - reuse) * reuse**n * row for n, row in enumerate(after)))
                guess.append(used[token, min(layer + 2, LAYERS - 1)])
        x = torch.stack(rows).double()
        ridge = torch.diag(RIDGE * x.square().sum(0))
        for own, targets in ((fitted.keep[layer], keep), (fitted.guess[1][min(layer + 2, LAYERS - 1)], guess)):
            if layer + 2 >= LAYERS and targets is guess:
                continue
            assert own is not None
            expected = torch.linalg.solve(x.T @ x + ridge, x.T @ torch.stack(targets).double())
            torch.testing.assert_close(own.T.double(), expected, atol=2e-4, rtol=1e-3)
    assert fitted.guess[0][0] is None and fitted.guess[1][1] is None


def test_guesses_are_fitted_to_the_numbers_that_routers_choose_by() -> None:
    """And to the choice itself where the numbers would have made another."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = torch.Generator().manual_seed(seed)
    own = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=draw)
    states = torch.randn(4 * 96, 1, HIDDEN, generator=draw) + 0.3 * torch.randn(4 * 96, LAYERS, HIDDEN, generator=draw)
    numbers = torch.einsum("tlh,leh->tle", states, own)
    index = numbers.topk(TOP_K, dim=-1).indices
    gates = [lambda x, own=own[layer]: x @ own.T for layer in range(LAYERS)]
    gates[1] = lambda x: -x @ own[1].T
    moments = Moments([EXPERTS] * LAYERS, HIDDEN, 1, 0.5, torch.device("cpu"), gates)
    for layer in range(LAYERS):
        moments.note(layer, states[:, layer], index[:, layer], index[:, layer].float())
    moments.end(len(states))
    x = torch.cat([states.expand(-1, LAYERS, -1), torch.ones(len(states), LAYERS, 1)], dim=-1)[:-TAIL].double()
    used = torch.zeros(*index.shape[:2], EXPERTS).scatter_(-1, index, 1.0)
    for layer, targets in ((1, used), (2, numbers)):
        found = fit(moments).guess[0][layer]
        assert found is not None
        before = x[:, layer - 1]
        ridge = torch.diag(RIDGE * before.square().sum(0))
        expected = torch.linalg.solve(before.T @ before + ridge, before.T @ targets[:-TAIL, layer].double())
        torch.testing.assert_close(found.T.double(), expected, atol=5e-4, rtol=1e-3)


def test_scores_replayed_are_the_policys_decisions() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = np.random.default_rng(seed)
    routes = draw.permuted(np.tile(np.arange(EXPERTS), (300, LAYERS, 1)), axis=-1)[..., :TOP_K].astype(np.int16)
    scores = (draw.normal(size=(300, LAYERS, EXPERTS)).round(1) / 8).astype(np.float32)  # some are equal
    for k in range(EXPERTS + 1):
        expected = [0] * LAYERS
        for layer in range(LAYERS):
            policy = LearnedPolicy(k)
            for used, score in zip(np.sort(routes[:, layer]).tolist(), scores[:, layer].tolist(), strict=True):
                policy.judge(score)
                missing = [expert for expert in used if expert not in policy]
                expected[layer] += len(used) - len(missing)
                for expert in used:
                    if expert not in missing:
                        policy.touch(expert)
                for expert in missing:
                    policy.admit(expert)
        assert scored_hits(routes, scores, k).tolist() == expected


def test_a_policy_without_scores_keeps_who_is_used_most() -> None:
    policy = LearnedPolicy(2)
    for used in [(0, 1)] * 8 + [(0, 2)] * 2 + [(3, 4)]:
        policy.judge([])
        for expert in used:
            policy.touch(expert) if expert in policy else policy.admit(expert)
    assert 0 in policy and 1 in policy


def test_recalls_are_shares_of_uses_over_all_tokens_of_the_layers_that_can_be_guessed() -> None:
    """By hand, in passes of different lengths; no layer is guessed three ahead but by the first."""
    seed, layers, depth = random.randrange(1 << 32), 4, 3
    print("seed", seed)
    draw = torch.Generator().manual_seed(seed)
    own = torch.randn(depth, layers, EXPERTS, HIDDEN + 1, generator=draw)
    asked = torch.randn(layers, EXPERTS, HIDDEN, generator=draw)
    guess = [[own[ahead, n] if n > ahead else None for n in range(layers)] for ahead in range(depth)]
    routers = [lambda x, gate=gate: (x @ gate.T).argsort(-1, descending=True) for gate in asked]
    judge = Judge(Matrices(guess, list(own[0])), next_gate(routers, depth), range(1, EXPERTS + 1))
    states = torch.randn(60, layers, HIDDEN, generator=draw)
    index = torch.rand(60, layers, EXPERTS, generator=draw).topk(TOP_K, dim=-1).indices
    for rows in (slice(0, 48), slice(48, 60)):
        for layer in range(layers):
            judge.note(layer, states[rows, layer], index[rows, layer], index[rows, layer].float())
        judge.end(rows.stop - rows.start)
    x, used = states.numpy(), index.numpy()
    np.testing.assert_array_equal(judge.routes(), used)
    recalls = {(r.depth, r.fetched): r for r in judge.recalls()}
    assert len(recalls) == depth * EXPERTS
    for (ahead, fetched), recall in recalls.items():
        right = {"learned": 0, "gate": 0}
        for layer in range(layers - ahead):
            mine, gate = own[ahead - 1, layer + ahead].numpy(), asked[layer + ahead].numpy()
            said = {"learned": x[:, layer] @ mine[:, :-1].T + mine[:, -1], "gate": x[:, layer] @ gate.T}
            for who, scores in said.items():
                for token, row in enumerate(np.argsort(-scores, axis=1)[:, :fetched]):
                    right[who] += len({*row.tolist()} & {*used[token, layer + ahead].tolist()})
        uses = 60 * (layers - ahead) * TOP_K
        assert recall.learned == pytest.approx(right["learned"] / uses, abs=1e-4)
        assert recall.gate == pytest.approx(right["gate"] / uses, abs=1e-4)
    assert recalls[3, EXPERTS].learned == recalls[3, EXPERTS].gate == 1


@pytest.fixture(scope="module")
def observed(demo_artifact: Path) -> Iterator[Engine]:
    with moeflow.load(demo_artifact, record_routes=True, execution="host", context_length=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def trained(observed: Engine) -> tuple[PredictorCard, Matrices]:
    return train_predictor(observed, TEXT, tokens=5120, depth=2)


def test_it_foresees_more_of_a_text_like_its_own_than_the_next_gate(trained: tuple[PredictorCard, Matrices]) -> None:
    card, _ = trained
    assert {(r.depth, r.fetched) for r in card.recalls} == {(1, 2), (1, 4), (2, 2), (2, 4)}
    for recall in card.recalls:
        assert recall.gate is not None and recall.learned > recall.gate
    for hits in card.hits:
        assert hits.lru < hits.learned <= hits.optimum and 0 < hits.closed <= 1
    assert card.tokens + card.held_out <= 5120


def test_the_file_comes_back_and_is_its_models_own(
    demo_artifact: Path, tiny_artifact: Path, trained: tuple[PredictorCard, Matrices], tmp_path: Path
) -> None:
    card, matrices = trained
    path, artifact = tmp_path / "predictor.safetensors", Artifact.open(demo_artifact)
    save_predictor(path, card, matrices)
    again, found = load_predictor(artifact, path)
    assert again == card
    states = torch.randn(64, card.hidden)
    for own, back in zip(matrices.keep, found.keep, strict=True):
        order = scores_of(own, states).argsort(-1)
        assert (scores_of(back, states).argsort(-1) == order).float().mean() > 0.97  # kept in 16 bits
    with pytest.raises(ArtifactError, match="routers of another model"):
        load_predictor(Artifact.open(tiny_artifact), path)
    with pytest.raises(ArtifactError, match="train-predictor"):
        load_predictor(artifact, tmp_path / "none")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match="not a predictor"):
        load_predictor(artifact, path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens": 600}, "too few"),
        ({"depth": 0}, "depth 0"),
        ({"reuse": 1.0}, "reuse"),
        ({"held_out": 0.0}, "held-out"),
    ],
)
def test_what_cannot_be_fitted_is_refused(observed: Engine, settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_predictor(observed, TEXT, **settings)  # type: ignore[arg-type]


def test_an_engine_that_observes_nothing_is_refused(demo_engine: Engine) -> None:
    with pytest.raises(UsageError, match="record_routes"):
        train_predictor(demo_engine, TEXT)
