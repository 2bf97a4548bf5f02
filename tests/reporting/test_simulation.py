"""A replay as text and picture: every share under its heading, and what a reader must know beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from picture_checks import assert_inside

from moeflow.errors import UsageError
from moeflow.reporting import curves
from moeflow.reporting.simulation import json_line, table
from moeflow.schema import Guessing, SimulatedRow, Simulation, Timing

# 2 layers, 50 uses each.
LRU = (SimulatedRow(policy="lru", k=2, hits=(10, 20)), SimulatedRow(policy="lru", k=4, hits=(25, 30)))
BEST = (SimulatedRow(policy="optimum", k=2, hits=(20, 30)), SimulatedRow(policy="optimum", k=4, hits=(35, 40)))
FORCED = (SimulatedRow(policy="lru", k=2, hits=(10, 20), guesses=50, guesses_used=35),)
GUESSING = Guessing(predictor="recall", recall=0.5, experts=2, depth=1, staging=4)


def simulation(**change: Any) -> Simulation:
    settings: dict[str, Any] = {
        "command": "moeflow simulate --model tiny -k 2 -k 4", "model": "tiny", "routing": "markov", "seed": 3,
        "tokens": 25, "layers": 2, "experts": 8, "top_k": 2, "rows": (*LRU, *BEST),
        "timings": (Timing(what="lru", steps=100, seconds=1e-4),),
    }  # fmt: skip
    return Simulation(**{**settings, **change})


def cells(text: str, title: str) -> list[list[str]]:
    """Of the table that begins with `title`."""
    block = next(block for block in text.split("\n\n") if block.startswith(title))
    return [line.split("  ") for line in block.splitlines()]


def words(line: list[str]) -> list[str]:
    return [cell.strip() for cell in line if cell.strip()]


def test_rates_stand_by_k_and_policy() -> None:
    text = table(simulation())
    assert text.startswith(
        "tiny: 2 layers, top-2 of 8 experts; Markov routing (Mixtral's repetition), seed 3, 25 tokens"
    )
    assert [words(line) for line in cells(text, "hits")] == [
        ["hits", "lru", "by layer", "optimum", "by layer"],
        ["k = 2", "30%", "20% to 40%", "50%", "40% to 60%"],
        ["k = 4", "55%", "50% to 60%", "75%", "70% to 80%"],
    ]
    assert "lru 1 (the optimum's serve every k)" in text
    assert "guess" not in text


def test_layers_have_tables_of_their_own_when_asked() -> None:
    found = cells(table(simulation(), by_layer=True), "lru")
    assert [words(line) for line in found] == [
        ["lru", "k = 2", "k = 4"], ["layer 0", "20%", "50%"], ["layer 1", "40%", "60%"]
    ]  # fmt: skip


def test_guesses_are_told_with_what_stands_for_the_gate() -> None:
    text = table(simulation(rows=(*LRU, *FORCED, *BEST), guessing=GUESSING))
    assert "guesses: 2 for the next layer, 50% of them right; 4 landing buffers" in text
    assert "a recall stands for it" in " ".join(text.split())
    assert words(cells(text, "with guesses")[1]) == ["lru, k = 2", "30%", "50%", "2", "0.6", "30%"]
    before = Guessing(predictor="previous", experts=1, depth=2, staging=6)
    text = table(simulation(rows=(*LRU, *FORCED, *BEST), guessing=before))
    assert "guesses: 1 for each of the next 2 layers, what the token before used; 6 landing buffers" in text
    assert "recall" not in text


def test_nothing_foreseen_where_nothing_was_missed() -> None:
    full = SimulatedRow(policy="lru", k=8, hits=(50, 50), guesses=0, guesses_used=0)
    run = simulation(rows=(*LRU, full), guessing=GUESSING)
    assert run.foreseen(full) is None and run.wasted(full) == 0
    assert words(cells(table(run), "with guesses")[1]) == ["lru, k = 8", "100%", "-", "0", "0", "-"]


def test_json_is_the_document_with_its_shares() -> None:
    run = simulation(rows=(*LRU, *FORCED, *BEST), guessing=GUESSING)
    line = json_line(run)
    assert "\n" not in line
    document = json.loads(line)
    assert document["derived"][0] == {
        "hit_rate": 0.3, "layer_hit_rates": [0.2, 0.4], "foreseen": None, "wasted": None
    }  # fmt: skip
    assert document["derived"][2]["foreseen"] == 0.5 and document["derived"][2]["wasted"] == 15
    assert any("a recall stands for it" in remark for remark in document["remarks"])
    del document["derived"], document["remarks"]
    assert Simulation.parse(document, "line") == run


def test_a_picture_has_a_line_for_each_policy_at_its_rates(tmp_path: Path) -> None:
    run = simulation(rows=(*LRU, *FORCED, *BEST), guessing=GUESSING)
    figure = curves._figure(run)
    lines = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in figure.axes[0].get_lines()}
    assert {name: [(k, round(float(rate), 9)) for k, rate in points] for name, points in lines.items()} == {
        "lru": [(2, 30), (4, 55)], "lru, hit or foreseen": [(2, 65)], "optimum": [(2, 50), (4, 75)]
    }  # fmt: skip
    curves.plot(run, tmp_path / "hits.png")
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("command", ["moeflow simulate", "moeflow simulate " + 12 * "--policy lru -k 100 "])
def test_every_text_is_inside_the_picture(command: str) -> None:
    figure = curves._figure(simulation(command=command, rows=(*LRU, *FORCED, *BEST), guessing=GUESSING))
    assert_inside(figure)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"hits\.pdf: a plot is written as PNG"):
        curves.plot(simulation(), tmp_path / "hits.pdf")
