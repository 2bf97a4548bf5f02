"""Log-likelihoods of continuations against transformers' own forward, and how much of them is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import checkpoint_model, logits_of

import moeflow
from moeflow.engine import Engine
from moeflow.errors import UsageError
from moeflow.evaluation import scoring
from moeflow.evaluation.scoring import Score, Scorer

LIMIT = 32
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def engine(plain: Path) -> Iterator[Engine]:
    with moeflow.load(plain, context_length=LIMIT) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return checkpoint_model(tiny_checkpoint)


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One request by itself, cut on the left as lm_eval cuts it."""
    ids = [*context, *continuation][-(LIMIT + 1) :]
    rows = logits_of(model, ids[:-1]).double().log_softmax(-1)[-len(continuation) :]
    nats = sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))
    return nats, rows.argmax(-1).tolist() == continuation


def assert_same(found: list[Score], model: Any, requests: list[tuple[list[int], list[int]]]) -> None:
    for score, request in zip(found, requests, strict=True):
        nats, greedy = alone(model, *request)
        assert score.likelihood == pytest.approx(nats, abs=TOLERANCE)
        assert score.greedy == greedy


@pytest.mark.parametrize("chunk", [4, 512])
def test_scores_are_those_of_each_request_alone(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(scoring, "PREFILL_CHUNK", chunk)
    shots = random_ids(9, 0)
    contexts = [
        [*shots, *random_ids(5, 1)],
        random_ids(4, 2),
        [*shots, *random_ids(3, 3)],
        shots,
        [7],
        random_ids(40, 4),
    ]
    choices = [[5], [6], random_ids(4, 5), random_ids(11, 6), [5]]
    requests = [(context, choice) for choice in choices for context in contexts]
    for context in contexts[:3]:  # and one that is likeliest all along
        best = logits_of(model, context)[-1].argmax().item()
        requests += [(context, [best]), (context, [best, logits_of(model, [*context, best])[-1].argmax().item()])]
    scorer = Scorer(engine)
    found = scorer.score(requests)
    assert_same(found, model, requests)
    assert sum(score.greedy for score in found) >= 6
    assert scorer.tally.truncated == len(choices)  # the context of 40


def test_what_requests_share_is_computed_once(engine: Engine) -> None:
    shots, questions = random_ids(10, 0), [[1, 2, 3], [1, 4, 5]]
    scorer = Scorer(engine)
    scorer.score([([*shots, *question], [choice]) for question in questions for choice in (10, 11, 12, 13)])
    assert (scorer.tally.requests, scorer.tally.tokens) == (8, 8 * 13)
    assert scorer.tally.computed == 13 + 2  # the second question differs in its last two tokens
    scorer.score([([*shots, 9], [20, 21, 22]), ([*shots, 9], [20, 23]), ([*shots, 9], [20, 23])])
    assert scorer.tally.computed == 15 + 3 + 1  # one pass over 9, 20, 21; then 20 again; an equal request costs nothing


def test_a_cache_that_cannot_be_cut_back_is_replaced(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(engine)
    requests = [(random_ids(6, 1), random_ids(3, seed)) for seed in (2, 3, 4)]
    monkeypatch.setattr("moeflow.model.kv.GrowingKv.crop", lambda self, length: length == self.length)
    assert_same(scorer.score(requests), model, requests)
    assert scorer.tally.computed == scorer.tally.tokens == 3 * 8


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [([], [1], "one token or more"), ([1], [], "one token or more"), ([1], [1] * (LIMIT + 1), "context of 32")],
)
def test_what_cannot_be_scored_is_refused(
    engine: Engine, context: list[int], continuation: list[int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Scorer(engine).score([(context, continuation)])


def test_the_longest_continuation_fits(engine: Engine, model: Any) -> None:
    requests = [(random_ids(3, 1), random_ids(LIMIT, 2))]
    assert_same(Scorer(engine).score(requests), model, requests)


WORDS = "And he said unto them, The LORD is my shepherd, I shall"


def test_an_answer_ends_before_its_first_stop(demo_engine: Engine) -> None:
    ids = demo_engine.tokenizer(WORDS)["input_ids"]
    whole = demo_engine.generate(WORDS, max_new_tokens=20, temperature=0).text
    stop, later = whole[9:13], whole[16:24]
    assert 0 < whole.find(stop) < whole.find(later)
    scorer = Scorer(demo_engine)
    assert scorer.answer(ids, 20, [later, "", stop], seed=0, temperature=0.0) == whole.partition(stop)[0]
    before = scorer.tally.computed
    assert scorer.answer(ids, 20, [], seed=0, temperature=0.0) == whole
    assert scorer.tally.computed - before == 1 + 19, "the prompt is there but for its last token"
    assert (scorer.tally.requests, scorer.tally.truncated) == (2, 0)


def test_a_prompt_too_long_loses_its_beginning_and_is_counted(
    demo_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = demo_engine.tokenizer(WORDS)["input_ids"]
    scorer = Scorer(demo_engine)
    monkeypatch.setattr(scorer, "limit", 16)
    assert len(ids) > 6
    text = scorer.answer(ids, 10, [], seed=0, temperature=0.0)
    assert text == demo_engine.generate(ids[-6:], max_new_tokens=10, temperature=0).text
    assert scorer.answer(ids[-6:], 10, [], seed=0, temperature=0.0) == text
    assert (scorer.tally.requests, scorer.tally.truncated) == (2, 1)
    with pytest.raises(UsageError, match=r"answers of up to 16 tokens, .* in a context of 16"):
        scorer.answer(ids, 16, [], seed=0)
