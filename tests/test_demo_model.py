"""The bundled model is what its page says: small, ordinary, trained, and every expert of it is used."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from oracle import checkpoint_model, logits_of

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.hub import resolve_model
from moeflow.engine import Engine

DEMO = resolve_model("demo")
# Psalm 23 and the beginning of Genesis 3 in the King James version, and a sentence of Persuasion: public domain.
TEXT = (
    "The LORD is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth me beside the "
    "still waters. He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake. Now the "
    "serpent was more subtil than any beast of the field which the LORD God had made. And he said unto the woman, Yea, "
    "hath God said, Ye shall not eat of every tree of the garden? Anne had not wanted this visit to Uppercross to "
    "learn that a removal from one set of people to another will often include a total change of conversation."
)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(DEMO)(TEXT)["input_ids"])


def perplexity(logits: torch.Tensor, ids: list[int]) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])))


def test_it_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 12 * 1024 * 1024


def test_it_has_the_shape_of_a_mixtral() -> None:
    checkpoint = Checkpoint.open(DEMO)
    assert checkpoint.family.model_type == "mixtral"
    assert len(checkpoint.layers) >= 6
    assert {len(layer.experts) for layer in checkpoint.layers} == {8}
    assert checkpoint.top_k == 2
    assert all(layer.hidden % 64 == 0 and layer.intermediate % 64 == 0 for layer in checkpoint.layers)
    assert checkpoint.parameters(experts_only=True) > 0.7 * checkpoint.parameters()


def test_it_is_trained(ids: list[int]) -> None:
    """Far below the unigram's perplexity on held-out text, 569, and the 5-gram's, 37."""
    assert perplexity(logits_of(checkpoint_model(DEMO), ids), ids) < 30


def test_its_record_tells_how_to_make_it_and_beats_the_baselines() -> None:
    record = json.loads((DEMO / "training.json").read_text())
    assert {"seed", "windows_per_step", "peak_rate"} <= record["settings"].keys()
    assert {"sources", "train", "heldout"} <= record["corpus"].keys()
    baselines = [entry["bits_per_byte"] for entry in record["corpus"]["baselines"].values()]
    assert len(baselines) == 2
    assert record["heldout"]["bits_per_byte"] < min(baselines)
    losses = [point["heldout_loss"] for point in record["curve"]]
    assert losses[-1] < losses[0]


def test_every_expert_of_every_layer_is_used(ids: list[int], demo_engine: Engine) -> None:
    used: list[set[int]] = [set() for _ in demo_engine.artifact.manifest.layers]
    hooks = []
    for layer, seen in zip(demo_engine.artifact.manifest.layers, used, strict=True):
        router = demo_engine._model.get_submodule(layer.router)
        hooks.append(router.register_forward_hook(lambda _m, _i, r, seen=seen: seen.update(r[2].flatten().tolist())))
    demo_engine.logits(ids)
    for hook in hooks:
        hook.remove()
    assert all(seen == set(range(8)) for seen in used)


def test_four_bits_cost_little(ids: list[int], demo_engine: Engine) -> None:
    exact = perplexity(logits_of(checkpoint_model(DEMO), ids), ids)
    assert perplexity(demo_engine.logits(ids), ids) < 1.15 * exact


def test_its_text_reads_as_sentences(demo_engine: Engine) -> None:
    text = demo_engine.generate("The king said", max_new_tokens=80, temperature=0.7, seed=4).text
    words = [word.strip(" ,.;:'\"!?-()") for word in text.split()]
    assert len(words) > 40
    common = {
        "the",
        "of",
        "and",
        "to",
        "in",
        "a",
        "that",
        "he",
        "his",
        "him",
        "i",
        "it",
        "is",
        "for",
        "not",
        "with",
        "you",
    }
    assert sum(word.lower() in common for word in words) > 0.2 * len(words)


def test_the_licence_note_is_there() -> None:
    assert "public domain" in Path(DEMO / "LICENSE.md").read_text()
