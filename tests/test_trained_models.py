"""The training forward pass is transformers' own function, and a run leaves a checkpoint that transformers reads."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
VOCABULARY = 256
SIZES = {"layers": 2, "hidden": 64, "inner": 64, "heads": 2, "kv_heads": 1, "context": 32}


@pytest.fixture(scope="module")
def tools() -> Any:
    """The modules of tools/, which is a folder of scripts and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        names = {
            "corpus": "corpus",
            "books": "corpus_books",
            "sources": "corpus_sources",
            "model": "trained_model",
            "train": "train_model",
            "evaluate": "evaluate_model",
        }
        yield {short: importlib.import_module(name) for short, name in names.items()}


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (32, 4)])
def test_the_training_pass_is_transformers_forward(tools: Any, experts: int, top_k: int) -> None:
    trained = tools["model"]
    shape = trained.Shape(experts=experts, top_k=top_k, initializer_range=0.3, **SIZES)
    model = trained.build(shape, VOCABULARY, seed=1, balance=0.01)
    tokens = torch.randint(VOCABULARY, (3, 33), generator=torch.Generator().manual_seed(2))
    loss, _ = trained.language_loss(model, tokens, dropout=0.0)
    loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(tokens[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_even_router_pays_the_coefficient(tools: Any) -> None:
    """Equal probabilities: the balancing loss is 1 whatever is chosen, the z-loss log(experts) squared."""
    trained = tools["model"]
    rules = trained.Rules(head_dim=32, top_k=4, balance=0.01, dropout=0.0)
    weights, loss = trained.route(torch.randn(2, 5, 64), torch.zeros(32, 64), rules)
    assert (weights > 0).sum(-1).eq(4).all() and weights.sum(-1).allclose(torch.ones(2, 5))
    assert loss.item() == pytest.approx(0.01 + trained.Z_LOSS * np.log(32) ** 2, rel=1e-5)


def test_mid_size_models_fit_their_files(tools: Any) -> None:
    trained = tools["model"]
    for name in ("mid-8x2", "mid-32x4"):
        with torch.device("meta"):
            model = trained.build(trained.SHAPES[name], 4096, seed=0, balance=0.01)
        assert 20e6 < sum(parameter.numel() for parameter in model.parameters()) <= 30e6
        linear = [p for p in model.parameters() if p.ndim > 1]
        assert all(parameter.shape[-1] % 64 == 0 for parameter in linear)


@pytest.fixture
def corpus(tools: Any, tmp_path: Path) -> Path:
    """A stream in which every token follows from the last, and two held-out documents of two sources."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    stream = (np.arange(5000) * 7 % VOCABULARY).astype(np.uint16)
    tools["corpus"].write_arrays(folder / "tokens.npz", {"train": stream, "heldout": stream[:900]})
    recipe = {"vocabulary": VOCABULARY, "heldout": {"text_bytes": 900}, "baselines": {}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    documents = [{"source": s, "key": s, "bytes": n, "tokens": n} for s, n in (("a", 300), ("b", 600))]
    (folder / "heldout.json").write_text(json.dumps(documents))
    return folder


def test_a_run_learns_saves_and_is_measured(tools: Any, corpus: Path, tmp_path: Path) -> None:
    shape = tools["model"].Shape(experts=8, top_k=2, **SIZES)
    settings = replace(tools["train"].DEFAULTS["mid-8x2"], windows_per_step=4, max_epochs=1.0, peak_rate=1e-2)
    output, log = tmp_path / "model", tmp_path / "log.jsonl"
    record = tools["train"].train(settings, shape, corpus, output, max_shard_size="100KB", log=log)
    assert record["steps"] == int(5000 / (4 * 32))
    losses = [point["train_loss"] for point in record["curve"]]
    assert losses[-1] < losses[0] - 1
    assert [json.loads(line) for line in log.read_text().splitlines()] == record["curve"]
    assert max(path.stat().st_size for path in output.glob("*.safetensors")) <= 110_000
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_experts_per_tok == 2 and model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(output).eos_token_id is not None

    measured = tools["evaluate"].report(corpus, output, with_samples=False)
    assert measured["heldout"]["nats_per_token"] == pytest.approx(record["curve"][-1]["heldout_loss"], abs=0.2)
    parts = measured["heldout"]["by_source"]
    assert [part["tokens_scored"] for part in parts.values()] == [299, 600]
    assert np.allclose(np.sum(measured["expert_usage"]["layers"], axis=1), 1, atol=1e-3)
    assert json.loads((output / "training.json").read_text()) == measured


def test_the_budget_ends_a_run(tools: Any, corpus: Path, tmp_path: Path) -> None:
    shape = tools["model"].Shape(experts=8, top_k=2, **SIZES)
    settings = replace(tools["train"].DEFAULTS["mid-8x2"], windows_per_step=1, max_epochs=1e6, budget_seconds=2.0)
    record = tools["train"].train(settings, shape, corpus, tmp_path / "model")
    assert sum(record["seconds_before_training"].values()) + record["training_seconds"] < 8
    assert record["curve"][-1]["step"] == record["steps"] > 1


def test_held_out_documents_are_few_and_drawn_alike_in_any_order(tools: Any) -> None:
    books, sources = tools["books"], tools["sources"]
    documents = [books.Document(f"page {number}", letter * 100) for letter in "ab" for number in range(300)]
    source = sources.Source("package", "title", "licence", lambda _: documents, most_bytes=9_999)
    unlimited = replace(source, most_bytes=None)
    assert len(unlimited.documents(Path())) == 600
    assert len(source.documents(Path())) == 99
    held = source.heldout_keys(documents)
    assert 0 < len(held) <= sources.HELD_OUT_MOST * 300
    assert held == source.heldout_keys(documents[::-1])
