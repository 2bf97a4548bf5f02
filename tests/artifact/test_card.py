"""The model card: front matter that the hub reads, a licence that is carried over and never guessed, equal bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeflow.artifact.blueprint import Blueprint
from moeflow.artifact.card import front_matter, model_card
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.artifact.reader import Artifact
from moeflow.schema import BitsAndBytesScheme, HqqScheme, Quantization

QUANTIZATION = Quantization(experts=HqqScheme(bits=3), attention=BitsAndBytesScheme(format="nf4"))
HUB = "someone/Some-Model_v0.1"


def _card(checkpoint: Path, source: str = HUB) -> tuple[dict[str, Any], str]:
    text = model_card(Blueprint(Checkpoint.open(checkpoint), source, QUANTIZATION))
    found = re.fullmatch(r"---\n(.*?\n)---\n(.*)", text, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1]), found[2]


def test_the_front_matter_names_the_model_and_what_it_became(own_checkpoint: Path) -> None:
    head, text = _card(own_checkpoint)
    assert head["base_model"] == HUB and head["base_model_relation"] == "quantized"
    assert head["library_name"] == "moeflow" and head["pipeline_tag"] == "text-generation"
    assert head["tags"] == ["moeflow", "mixture-of-experts", "mixtral", "3-bit", "nf4"]
    assert "# Some-Model_v0.1, packed by moeflow" in text and f"https://huggingface.co/{HUB}" in text
    assert "| experts | 3-bit g64 |" in text and "| attention | nf4 |" in text and "experts 3-bit g64" in text


def test_the_licence_is_the_checkpoints(own_checkpoint: Path) -> None:
    head, _ = _card(own_checkpoint)
    assert (head["license"], head["license_link"]) == ("other", "LICENSE")
    (own_checkpoint / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: other/base\ntags: [x]\n---\n# A model\n---\nlicense: mit\n---\n"
    )
    head, text = _card(own_checkpoint)
    assert head["license"] == "apache-2.0" and "license_link" not in head
    assert head["base_model"] == HUB and "A model" not in text and "x" not in head["tags"]
    (own_checkpoint / "README.md").write_text(
        "---\nlicense: other\nlicense_name: my-own\nlicense_link: https://example.org/l\n---\n"
    )
    head, _ = _card(own_checkpoint)
    assert [head[key] for key in ("license", "license_name", "license_link")] == [
        "other", "my-own", "https://example.org/l",
    ]  # fmt: skip
    (own_checkpoint / "README.md").unlink()
    (own_checkpoint / "LICENSE").unlink()
    assert "license" not in _card(own_checkpoint)[0]


def test_a_directory_is_no_base_model_and_its_path_is_not_told(own_checkpoint: Path) -> None:
    head, text = _card(own_checkpoint, str(own_checkpoint))
    assert "base_model" not in head
    assert f"# {own_checkpoint.name}, packed" in text and str(own_checkpoint.parent) not in text
    (own_checkpoint / "README.md").write_text("---\nbase_model: other/base\n---\n")
    assert _card(own_checkpoint, str(own_checkpoint))[0]["base_model"] == "other/base"


@pytest.mark.parametrize(
    "text",
    ["", "# no front matter\n", "---\n[1, 2]\n---\n", "---\na: [\n---\n", "---\nlicense: mit\n", "---\na: \x00\n---\n"],
)
def test_a_card_that_cannot_be_read_declares_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---\n")
    assert front_matter(tmp_path) == {} == front_matter(tmp_path / "nowhere")


def test_packs_have_equal_cards_which_people_may_edit(own_checkpoint: Path, tmp_path: Path) -> None:
    (own_checkpoint / "LICENSE.txt").write_text("More terms.\n")
    (own_checkpoint / "README.md").write_text("---\nlicense: mit\n---\nThe checkpoint's own page.\n")
    checkpoint = Checkpoint.open(own_checkpoint)
    for name in ("a", "b"):
        Packer(checkpoint, HUB, QUANTIZATION, tmp_path / name).run()
    card = tmp_path / "a" / "README.md"
    assert card.read_bytes() == (tmp_path / "b" / "README.md").read_bytes()
    assert "own page" not in card.read_text() and "license: mit" in card.read_text()
    for file in ("LICENSE", "LICENSE.txt"):
        assert (tmp_path / "a" / file).read_bytes() == (own_checkpoint / file).read_bytes()
    card.write_text("Mine.\n")
    opened = Artifact.open(tmp_path / "a")
    assert {"LICENSE", "LICENSE.txt"} <= set(opened.manifest.files) and "README.md" not in opened.manifest.files
    assert list(opened.verify()) == []
    Packer(checkpoint, HUB, QUANTIZATION, tmp_path / "a").run()
    assert card.read_text() == "Mine.\n"  # nothing was to be done
