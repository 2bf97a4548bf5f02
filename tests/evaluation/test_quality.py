"""Perplexity against transformers' own forward, divergence against numpy: on tiny models and random ids."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import checkpoint_model, dequantized_model, logits_of

import moeflow
from moeflow.engine import Engine
from moeflow.errors import ArtifactError, UsageError
from moeflow.evaluation import quality
from moeflow.evaluation.quality import divergence, perplexity
from moeflow.evaluation.windows import scored, windows

# Engine and transformers round differently, by at most 2e-5 of the largest logit (tests/test_engine.py); these are
# below 10 here, and the error of a mean is below that of its parts.
TOLERANCE = 2e-4
CASES = [(8, 1), (8, 3), (8, 8), (16, 5), (16, 16), (64, 64), (64, 7), (2, 1), (2, 2)]


@pytest.fixture(scope="module")
def engine(plain: Path) -> Iterator[Engine]:
    with moeflow.load(plain, context_length=64) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return checkpoint_model(tiny_checkpoint)


def random_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def documented(model: Any, ids: list[int], context: int, stride: int) -> tuple[float, int]:
    """Sum of nats and tokens, written down after the guide of transformers, whose labels are -100 where not counted."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        labels = np.array(ids[begin:end])
        labels[: len(labels) - (end - previous)] = -100
        chances = torch.log_softmax(logits_of(model, ids[begin:end]).double(), dim=-1).numpy()
        for place in range(1, len(labels)):  # transformers shifts labels: logits at place - 1 predict place
            if labels[place] != -100:
                total -= chances[place - 1, labels[place]]
                count += 1
        previous = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize(("context", "stride"), CASES)
@pytest.mark.parametrize("length", [2, 40])
def test_it_is_what_transformers_forward_gives(
    engine: Engine, model: Any, length: int, context: int, stride: int
) -> None:
    ids = random_ids(length, seed=length)
    nats, count = documented(model, ids, context, stride)
    found = perplexity(engine, ids, context, stride)
    assert found.tokens == count == scored(length, context, stride)
    assert found.nll / count == pytest.approx(nats / count, abs=TOLERANCE)
    assert found.value == pytest.approx(math.exp(nats / count), rel=TOLERANCE)
    assert found.seconds > 0


def test_a_text_shorter_than_the_context_is_one_window(engine: Engine, model: Any) -> None:
    ids = random_ids(20)
    chances = torch.log_softmax(logits_of(model, ids).double(), dim=-1)[:-1]
    nats = -chances.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    found = perplexity(engine, ids, 64, 64)
    assert (found.tokens, found.computed) == (19, 19)
    assert found.nll / 19 == pytest.approx(nats, abs=TOLERANCE)


def test_a_quantized_model_is_its_dequantized_weights(tiny_artifact: Path) -> None:
    ids = random_ids(30)
    nats, count = documented(dequantized_model(tiny_artifact), ids, 16, 4)
    with moeflow.load(tiny_artifact, hardware="cpu-2-cores", context_length=64) as engine:
        assert perplexity(engine, ids, 16, 4).nll / count == pytest.approx(nats / count, abs=TOLERANCE)


def test_chunks_change_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(50)
    whole = perplexity(engine, ids, 40, 30)
    monkeypatch.setattr(quality, "PREFILL_CHUNK", 7)
    sizes: list[int] = []
    pieces = perplexity(engine, ids, 40, 30, lambda rows: sizes.append(len(rows)))
    assert pieces.tokens == whole.tokens == sum(sizes)
    assert pieces.nll == pytest.approx(whole.nll, abs=whole.tokens * TOLERANCE)
    assert max(sizes) <= 7, "no more logits at once than a chunk has"


def test_counted_tokens_come_in_order_and_once() -> None:
    for count in range(2, 40):
        for context in range(2, 12):
            for stride in range(1, context + 1):
                found = list(windows(count, context, stride))
                counted = [t for w in found for t in range(w.first, w.end)]
                starts = {w.begin for w in found} if stride == context else {0}
                missing = sorted(set(range(count)) - set(counted))
                assert counted == sorted(set(counted))
                assert set(missing) <= starts | {count - 1 if stride == context else 0}
                assert all(w.end - w.begin <= context and w.first > w.begin for w in found)
                assert all(w.first - w.begin >= context - stride for w in found[1:])


def test_progress_is_told(engine: Engine) -> None:
    told: list[tuple[int, int]] = []
    perplexity(engine, random_ids(20), 8, 4, report=lambda done, total: told.append((done, total)))
    assert told[-1] == (19, 19) and told == sorted(told)


@pytest.mark.parametrize(
    ("count", "context", "stride", "message"),
    [
        (20, 8, 9, "stride is 9; it is from 1 to the context, 8"),
        (20, 8, 0, "stride is 0"),
        (20, 1, 1, "context is 1"),
        (20, 65, 8, "context is 65; the model is loaded for 64"),
        (1, 8, 8, "the text has 1 tokens"),
        (0, 8, 8, "the text has 0 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(engine: Engine, count: int, context: int, stride: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        perplexity(engine, random_ids(count), context, stride)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        perplexity(engine, [1, 2, 10**6], 8, 8)


def test_logits_that_are_no_numbers_are_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine.forward
    monkeypatch.setattr(engine, "forward", lambda *a, **k: forward(*a, **k) * float("nan"))
    with pytest.raises(ArtifactError, match="logits near token 1 of the text are no numbers"):
        perplexity(engine, random_ids(9), 8, 8)


def spread(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, 50, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 64, 65, 200])
def test_divergence_is_the_sum_of_its_definition(rows: int) -> None:
    one, other = spread(rows, 1), spread(rows, 2)
    p, q = (np.exp(t.double().numpy()) for t in (one, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    found = divergence(one, other)
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-10)
    assert found.agreed == int((p.argmax(1) == q.argmax(1)).sum())
    assert found.kl != pytest.approx(divergence(other, one).kl), "the reference comes first"


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = spread(100, 3)
    assert divergence(logits, logits).kl == 0
    assert divergence(logits, logits + 2).kl == pytest.approx(0, abs=1e-10), "a constant changes no probability"
    assert divergence(logits, logits).agreed == 100


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    """KL of even chances from those of logits d and -d is log cosh d, about d squared / 2: here 5e-11."""
    gap = 1e-5
    found = divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[gap, -gap]])).kl
    assert found == pytest.approx(math.log(math.cosh(gap)), rel=1e-3)
