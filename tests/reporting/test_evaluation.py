"""An evaluation as text and picture: every figure under its heading, the protocol beside it, the paper's layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from picture_checks import assert_inside
from sample_benchmark import run as benchmark

from moeflow.reporting import tradeoff
from moeflow.reporting.quality import json_line, markdown, table
from moeflow.schema import Divergence, Evaluated, Evaluation, TextProtocol

MIB = 1 << 20


def row(experts: str, attention: str, nats: float, size: int, **change: Any) -> Evaluated:
    """100 tokens were counted."""
    settings: dict[str, Any] = {
        "experts": experts, "attention": attention, "quantization": f"experts {experts}, attention {attention}",
        "expert_nbytes": size * MIB, "expert_parameters": 4 * MIB, "nbytes": (size + 1) * MIB, "parameters": 5 * MIB,
        "device": "cpu", "dtype": "float32", "nll": 100 * nats, "computed": 180, "seconds": 0.5,
    }  # fmt: skip
    return Evaluated(**{**settings, **change})


PLAIN = row("unquantized", "unquantized", 2.0, 8)
TWO = row("2-bit g64", "4-bit g64", 2.5, 2, divergence=Divergence(kl=12.5, agreed=81))
GRID = (TWO, row("unquantized", "4-bit g64", 2.1, 7), row("2-bit g64", "unquantized", 2.4, 3), PLAIN)


def evaluation(*rows: Evaluated, command: str = "moeflow eval a --text book.txt") -> Evaluation:
    protocol = TextProtocol(text="book.txt", digest="0" * 64, tokens=101, scored=100, context=64, stride=32)
    return Evaluation(
        command=command, date="2026-11-25T14:05:00Z", environment=benchmark().environment, model="x/y",
        source_digest="1" * 64, protocol=protocol, rows=rows,
    )  # fmt: skip


def block(text: str, title: str) -> list[list[str]]:
    lines = next(part for part in text.split("\n\n") if part.startswith(title)).splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_each_figure_stands_under_its_heading() -> None:
    text = table(evaluation(TWO, PLAIN))
    assert "x/y: book.txt, 101 tokens, of which 100 are counted: windows of 64, stride 32" in text
    head, own, reference = block(text, "quantization")
    assert dict(zip(head, own, strict=True)) == {
        "quantization": "experts 2-bit g64, attention 4-bit g64", "perplexity": f"{math.exp(2.5):.4g}", "KL": "0.125",
        "same top token": "81%", "experts": "2 MiB", "bits a weight": "4.00", "all weights": "3 MiB",
        "tokens/s": "360", "on": "cpu, float32",
    }  # fmt: skip
    assert reference[1:4] == ["7.389", "-", "-"]
    assert "attention \\ experts" not in text, "a model and its reference are no grid"


def test_what_nobody_measured_has_no_column() -> None:
    head, _ = block(table(evaluation(PLAIN)), "quantization")
    assert "KL" not in head and "same top token" not in head


def test_a_grid_has_the_papers_layout() -> None:
    assert block(table(evaluation(*GRID)), "attention") == [
        ["attention \\ experts, size / perplexity", "2-bit g64", "unquantized"],
        ["4-bit g64", "3 MiB / 12.18", "8 MiB / 8.166"],
        ["unquantized", "4 MiB / 11.02", "9 MiB / 7.389"],
    ]


def test_markdown_has_the_same_cells() -> None:
    run = evaluation(*GRID)
    text = markdown(run)
    assert "## x/y on book.txt, 2026-11-25" in text and run.command in text
    for title in ("quantization", "attention"):
        cells = [cell for line in block(table(run), title) for cell in line]
        assert all(f"| {cell} |" in text for cell in cells)


def test_the_json_line_is_the_document_and_what_follows_from_it() -> None:
    run = evaluation(TWO, PLAIN)
    document = json.loads(json_line(run))
    first, second = document.pop("derived")
    assert first["perplexity"] == pytest.approx(math.exp(2.5)) and second["mean_kl"] is None
    assert (first["mean_kl"], first["agreement"], first["expert_bits"]) == (0.125, 0.81, 4.0)
    assert Evaluation.parse(document, "line") == run


def test_a_perplexity_that_no_number_holds_is_infinite() -> None:
    run = evaluation(row("2-bit g64", "4-bit g64", 800, 2))
    assert run.perplexity(run.rows[0]) == math.inf
    assert "inf" in table(run)


def test_a_picture_has_each_packing_at_its_place(tmp_path: Path) -> None:
    figure = tradeoff._figure(evaluation(*GRID))
    lines = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in figure.axes[0].get_lines()}
    assert lines["attention 4-bit g64"] == [(3, pytest.approx(math.exp(2.5))), (8, pytest.approx(math.exp(2.1)))]
    assert lines["attention unquantized"] == [(4, pytest.approx(math.exp(2.4))), (9, pytest.approx(math.exp(2)))]
    tradeoff.plot(evaluation(*GRID), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["moeflow eval a", "moeflow eval " + 12 * "--reference some/where/else "])
def test_every_text_is_inside_the_picture(command: str) -> None:
    figure = tradeoff._figure(evaluation(TWO, PLAIN, command=command))
    assert_inside(figure)
