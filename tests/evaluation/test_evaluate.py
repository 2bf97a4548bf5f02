"""One evaluation of artifacts: figures against transformers and numpy, the reference, and what is refused."""

from __future__ import annotations

import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import checkpoint_model, dequantized_model, logits_of

from moeflow.artifact.reader import Artifact
from moeflow.errors import CapacityError, UsageError
from moeflow.evaluation import kept
from moeflow.evaluation.kept import KeptLogits
from moeflow.evaluation.run import Text, evaluate
from moeflow.schema import Evaluation
from moeflow.text import TextCodec

WORDS = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife. "
TEXT = Text("austen.txt", WORDS, context=32, stride=8)
TOLERANCE = 2e-4  # of a token's nats: see test_quality.py

Pack = Callable[..., Path]


def chances(model: object, ids: list[int], context: int, stride: int) -> np.ndarray:
    """Log-probabilities [n, V] of each counted token's place, by transformers' forward on each window."""
    rows, previous = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        found = torch.log_softmax(logits_of(model, ids[begin:end]).double(), dim=-1).numpy()
        rows += [found[place - 1 - begin] for place in range(max(previous, begin + 1), end)]
        previous = end
        if end == len(ids):
            break
    return np.stack(rows)


def test_figures_are_those_of_transformers(plain: Path, quantized: Path, tiny_checkpoint: Path) -> None:
    ids = TextCodec(plain).encode(WORDS)
    p = chances(checkpoint_model(tiny_checkpoint), ids, 32, 8)
    q = chances(dequantized_model(quantized), ids, 32, 8)
    run = evaluate(quantized, TEXT, plain)
    own, reference = run.rows
    count = len(ids) - 1
    assert (run.protocol.tokens, run.protocol.scored) == (len(ids), count)
    assert own.nll / count == pytest.approx(-q[np.arange(count), ids[1:]].mean(), abs=TOLERANCE)
    assert reference.nll / count == pytest.approx(-p[np.arange(count), ids[1:]].mean(), abs=TOLERANCE)
    assert own.divergence is not None and reference.divergence is None
    assert run.mean_kl(own) == pytest.approx(float((np.exp(p) * (p - q)).sum(1).mean()), abs=TOLERANCE)
    margins = (np.sort(q)[:, -1] - np.sort(q)[:, -2]).min(), (np.sort(p)[:, -1] - np.sort(p)[:, -2]).min()
    unsure = 1 if min(margins) < TOLERANCE else 0
    assert abs(own.divergence.agreed - int((p.argmax(1) == q.argmax(1)).sum())) <= unsure
    assert 0 < own.divergence.agreed < count


def test_without_a_reference_the_likelihood_is_the_same(plain: Path, quantized: Path) -> None:
    (alone,), (own, reference) = evaluate(quantized, TEXT).rows, evaluate(quantized, TEXT, plain).rows
    assert alone.nll == own.nll and alone.divergence is None
    assert evaluate(plain, TEXT).rows[0].nll == reference.nll


def test_a_model_does_not_diverge_from_itself(plain: Path) -> None:
    run = evaluate(plain, TEXT, plain)
    assert run.rows[0].divergence is not None
    assert run.rows[0].divergence.kl == 0
    assert run.agreement(run.rows[0]) == 1
    assert run.rows[0].nll == run.rows[1].nll


def test_sizes_leave_nothing_out(quantized: Path) -> None:
    row = evaluate(quantized, TEXT).rows[0]
    files = {path.name: path.stat().st_size for path in quantized.glob("*.safetensors")}
    assert row.nbytes == sum(files.values())
    assert row.expert_nbytes < row.nbytes
    assert 2.5 <= row.expert_bits < 4, "2 bits, scale and zero per 64 weights, and padding to pages"
    manifest = Artifact.open(quantized).manifest
    assert row.parameters == manifest.model.parameters


def test_settings_are_chosen_for_the_model(plain: Path) -> None:
    run = evaluate(plain, Text("t", WORDS * 4))
    most = Artifact.open(plain).manifest.model.max_context
    assert (run.protocol.context, run.protocol.stride) == (min(2048, most), min(512, most))
    few = evaluate(plain, Text("t", WORDS, 16, None, 20)).protocol
    assert (few.tokens, few.context, few.stride) == (20, 16, 16)


def test_documents_are_read_back(plain: Path, tmp_path: Path) -> None:
    run = evaluate(plain, TEXT)
    run.save(tmp_path / "e.json")
    assert Evaluation.load(tmp_path / "e.json") == run


def test_progress_names_the_model(plain: Path, quantized: Path) -> None:
    told: list[tuple[str, int, int]] = []
    evaluate(quantized, TEXT, plain, lambda *said: told.append(said))
    assert [what for what, done, total in told if done == total] == [
        "experts unquantized, attention unquantized", "experts 2-bit g64, attention unquantized"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Text("t", WORDS, context=10**6), "context is 1000000; the model was made for no more than"),
        (Text("t", WORDS, context=8, stride=9), "stride is 9"),
        (Text("t", ""), "the text has 0 tokens"),
        (Text("t", WORDS, tokens=1), "the text has 1 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(plain: Path, text: Text, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(plain, text)


def test_a_reference_of_another_model_is_refused(
    quantized: Path, pack: Pack, checkpoint_factory: Callable[..., Path]
) -> None:
    other = pack(checkpoint_factory("olmoe"))
    with pytest.raises(UsageError, match="packed from another model"):
        evaluate(quantized, TEXT, other)


def test_a_quantized_reference_is_refused(quantized: Path, plain: Path) -> None:
    with pytest.raises(UsageError, match=r"is quantized \(experts 2-bit g64, attention unquantized\)"):
        evaluate(plain, TEXT, quantized)


def test_kept_logits_come_back_as_they_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = torch.randn(10, 7)
    with KeptLogits(10) as file:
        for piece in rows.split(4):
            file.write(piece)
        file.rewind()
        assert torch.equal(torch.cat([file.read(3), file.read(7)]), rows)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_an_error_before_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: usage(10**6, 0, 10**6))
    with KeptLogits(10_000) as file, pytest.raises(CapacityError, match=r"--tokens.*TMPDIR"):
        file.write(torch.zeros(5, 100))
