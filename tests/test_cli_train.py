"""The command that learns a predictor: what it prints, writes and refuses, and that the file is then used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moeflow.artifact.predictors import PREDICTOR
from moeflow.schema import PredictorCard

Moe = Callable[..., tuple[int, str, str]]
CPU = ("--hardware", "cpu-2-cores")


@pytest.fixture
def artifact(demo_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_artifact, tmp_path / "artifact"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{verse} And the king said unto them, Go ye into the city." for verse in range(300)))
    return path


def test_a_predictor_is_written_shown_and_used(moe: Moe, artifact: Path, text: Path) -> None:
    learned = ("--policy", "learned", "--predictor", "learned", *CPU)
    code, _, said = moe("generate", artifact, "-p", "And", "--max-new-tokens", 4, *learned)
    assert code == 5 and "moeflow train-predictor" in said
    code, printed, said = moe("train-predictor", artifact, "--text", text, "-n", 3600, *CPU)
    assert code == 0, said
    assert "next gate" in printed and "optimum" in printed and "--policy learned" in " ".join(said.split())
    assert (artifact / PREDICTOR).is_file()
    code, answer, said = moe("generate", artifact, "-p", "And", "--max-new-tokens", 8, "--seed", 3, "--json", *learned)
    assert code == 0, said
    _, plain, _ = moe("generate", artifact, "-p", "And", "--max-new-tokens", 8, "--seed", 3, "--json", *CPU)
    assert json.loads(answer)["ids"] == json.loads(plain)["ids"]


def test_its_card_as_json_and_another_place(moe: Moe, artifact: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--text", text, "-n", 3600, "--depth", 1, "-o", tmp_path / "p.safetensors", "--json", *CPU)
    code, printed, said = moe("train-predictor", artifact, *arguments)
    assert code == 0, said
    card = PredictorCard.parse(json.loads(printed), "printed")
    assert card.depth == 1 and {recall.depth for recall in card.recalls} == {1}
    assert (tmp_path / "p.safetensors").is_file() and not (artifact / PREDICTOR).exists()


def test_what_it_refuses(moe: Moe, artifact: Path, text: Path, tmp_path: Path) -> None:
    code, _, said = moe("train-predictor", artifact, "--text", text, "-n", 500, *CPU)
    assert code == 2 and "too few" in said and str(text) in said
    code, _, said = moe("train-predictor", artifact, "--text", tmp_path / "none.txt", *CPU)
    assert code != 0 and "none.txt" in said
    assert not (artifact / PREDICTOR).exists()
    code, _, said = moe("simulate", "--model", "mixtral-8x7b", "-n", 10, "--policy", "learned")
    assert code == 2 and "train-predictor" in said
