"""`moeflow eval` and `eval-grid` as commands: what they write, and how they end when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.errors import MoeflowError
from moeflow.schema import Evaluation
from moeflow.schema.kinds import load_any

WORDS = "It is a truth universally acknowledged, that a single man must be in want of a wife."


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def run(*arguments: str | Path) -> str:
    """What the command prints; errors of moeflow are raised, with their exit codes."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_prints_a_table_and_writes_what_is_asked(tiny_artifact: Path, text: Path, tmp_path: Path) -> None:
    record, page, picture = tmp_path / "e.json", tmp_path / "e.md", tmp_path / "e.png"
    out = run("eval", tiny_artifact, "--text", text, "--context", "16", "--stride", "8", "-n", "40",
              "-o", record, "--markdown", page, "--plot", picture)  # fmt: skip
    assert "words.txt, 40 tokens, of which 39 are counted: windows of 16, stride 8" in out
    found = load_any(record)
    assert isinstance(found, Evaluation) and found.protocol.scored == 39
    assert f"{found.perplexity(found.rows[0]):.4g}" in out
    assert page.read_text().startswith("\n## tiny/mixtral on words.txt")
    assert picture.read_bytes().startswith(b"\x89PNG")
    line = json.loads(run("eval", tiny_artifact, "--text", text, "--context", "16", "--json"))
    assert line["protocol"]["stride"] == 16 and line["derived"][0]["perplexity"] > 1


def test_a_grid_is_written_beside_its_artifacts(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = run("eval-grid", tiny_checkpoint, "-o", tmp_path / "grid", "--experts", "4,16", "--attention", "8,16",
              "--text", text, "--context", "16", "-n", "20", "--no-keep")  # fmt: skip
    assert "attention \\ experts, size / perplexity" in out
    assert len(Evaluation.load(tmp_path / "grid" / "grid.json").rows) == 4
    assert not [path for path in (tmp_path / "grid").iterdir() if path.is_dir()]


def arguments_of(case: str, artifact: Path, text: Path) -> list[str | Path]:
    missing = text.with_name("missing.txt")
    empty = text.with_name("empty.txt")
    empty.write_text("")
    return {
        "no text": ["eval", artifact],
        "two texts": ["eval", artifact, "--text", text, "--dataset", "c4"],
        "missing file": ["eval", artifact, "--text", missing],
        "empty file": ["eval", artifact, "--text", empty],
        "unknown name": ["eval", artifact, "--dataset", "lambada"],
        "stride": ["eval", artifact, "--text", text, "--context", "8", "--stride", "9"],
        "context": ["eval", artifact, "--text", text, "--context", "1000000"],
        "no artifact": ["eval", text.parent, "--text", text],
        "reference": ["eval", artifact, "--text", text, "--reference", artifact],
        "picture": ["eval", artifact, "--text", text, "--plot", "a.pdf"],
        "text and tasks": ["eval", artifact, "--text", text, "--tasks", "mmlu"],
        "limit of a text": ["eval", artifact, "--text", text, "--limit", "3"],
        "stride of tasks": ["eval", artifact, "--tasks", "mmlu", "--stride", "3"],
        "no tasks": ["eval", artifact, "--tasks", " ,"],
        "scheme": ["eval-grid", "demo", "-o", text.parent, "--experts", "x", "--text", text],
    }[case]


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("no text", 2, "give --text with a file, or --dataset"),
        ("two texts", 2, "one of the two"),
        ("missing file", 7, "missing.txt: cannot read: no such file"),
        ("empty file", 2, "empty.txt: the text is empty"),
        ("unknown name", 2, "unknown data set 'lambada'; known: c4, ptb, wikitext-2"),
        ("stride", 2, "stride is 9; it is from 1 to the context, 8"),
        ("context", 2, "the model was made for no more than"),
        ("no artifact", 5, "no manifest.json"),
        ("reference", 2, "is quantized"),
        ("picture", 2, "a plot is written as PNG"),
        ("text and tasks", 2, "--text is for texts; --tasks goes without it"),
        ("limit of a text", 2, "--limit is for tasks: name some with --tasks"),
        ("stride of tasks", 2, "--stride is for texts"),
        ("no tasks", 2, "--tasks names none"),
        ("scheme", 2, "'x' is no scheme"),
    ],
)
def test_what_is_wrong_is_said_with_its_exit_code(
    tiny_artifact: Path, text: Path, case: str, code: int, message: str
) -> None:
    with pytest.raises(MoeflowError) as caught:
        run(*arguments_of(case, tiny_artifact, text))
    assert caught.value.exit_code == code and message in str(caught.value)
