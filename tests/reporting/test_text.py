"""Benchmarks as text: every figure where it belongs, a dash where nothing was measured, columns that line up."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from sample_benchmark import row, run

from moeflow.probe.match import known_hardware
from moeflow.reporting.cells import digits, fill, grids, listed, percent
from moeflow.reporting.paper import A100, MEASURED, ROWS, K, paper_speed
from moeflow.reporting.text import json_line, markdown, table
from moeflow.schema import Benchmark


def blocks(text: str) -> list[list[str]]:
    return [block.splitlines() for block in text.rstrip().split("\n\n")]


# -- the table ---------------------------------------------------------------------------------------------


def test_a_table_says_what_ran_and_where() -> None:
    head = " ".join(blocks(table(run()))[0])
    for said in (
        "mixtral-8x7b, random weights, 2-bit g64 experts, 4-bit g64 attention, k = 4 of 8, uniform routing, "
        "70% of guesses right, device-driven, batch 1, prompt of 16, 128 tokens decoded",
        "NVIDIA H100 80GB HBM3 (79.6 GiB), 16 cores of Xeon, 128 GiB; copy engine at 1 GiB 54.7 GB/s",
        "device memory 3,050 GB/s",
        "driver 580.1, Python 3.12.3, torch 2.11.0+cu130 (CUDA 13.0), transformers 5.17.0, moeflow 0.1.0 at 3d66d47",
        "2026-11-24T09:12:00Z  moeflow bench --synthetic mixtral-8x7b --ablations",
    ):
        assert said in head


def test_each_figure_stands_under_its_heading() -> None:
    speed, prefill, link, memory = grids(run())
    full, _, no_cache, naive = (dict(zip(speed.headings, cells, strict=True)) for cells in speed.rows)
    assert full == {
        "row": "full algorithm", "tokens/s": "27.9", "paper, A100": "3.06", "ms/token": "35.8", "hits": "50%",
    }  # fmt: skip
    assert dict(zip(prefill.headings, prefill.rows[0], strict=True)) == {
        "row": "full algorithm", "first token, ms": "310", "moved": "13.1 GiB", "of link's time": "120%",
        "cold, ms": "280", "moved, cold": "13.1 GiB", "of link's time, cold": "109%",
    }  # fmt: skip
    assert no_cache["hits"] == "0%", "measured, and none"
    assert naive["hits"] == "-", "not measured"
    full, _, _, naive = (dict(zip(link.headings, cells, strict=True)) for cells in link.rows)
    assert full == {
        "row": "full algorithm", "missed": "1.54 GiB", "guessed": "210 MiB", "wasted": "105 MiB", "streamed": "-",
        "achieved": "52.2 GB/s", "of peak": "95.5%", "guesses used, in all": "400 of 512",
    }  # fmt: skip
    assert (naive["missed"], naive["streamed"], naive["of peak"]) == ("-", "13.1 GiB", "95.3%")
    full = dict(zip(memory.headings, memory.rows[0], strict=True))
    assert full == {
        "row": "full algorithm", "read per token": "4.4 GiB", "achieved": "132 GB/s", "of bandwidth": "4.32%",
        "device, in use": "16.4 GiB", "of plan": "101%",
    }  # fmt: skip


def test_columns_line_up_and_fit_a_terminal() -> None:
    for block in blocks(table(run()))[1:5]:
        ends = [[m.end() for m in re.finditer(r"\S+( \S+)*", line)][1:] for line in block]
        assert len({tuple(e) for e in ends}) == 1, "figures end in the same columns"
        assert max(map(len, block)) <= 120 and block == [line.rstrip() for line in block]


def test_what_nobody_measured_has_no_column() -> None:
    speed = run(rows=(row(model="other"),), limits={})
    assert [block[0].split() for block in blocks(table(speed))[1:]] == [["speed", "tokens/s", "ms/token"]]
    nothing = run(rows=(row(tokens_per_second=None),), limits={})
    assert len(blocks(table(nothing))) == 1


def test_settings_that_differ_become_columns_and_leave_the_head() -> None:
    other = run(rows=(row(), row(k=8, routing="markov"), row(strategy="naive", k=0)))
    head, speed = blocks(table(other))[:2]
    assert "k = 4" not in " ".join(head) and "routing" not in " ".join(head)
    assert "4-bit g64 attention" in " ".join(head)
    assert [line.split("  ")[0] for line in speed[1:]] == ["full algorithm", "full algorithm", "naive offloading"]
    assert speed[0].split() == ["speed", "k", "routing", "tokens/s", "paper,", "A100", "ms/token"]
    cells = [re.split(r"\s{2,}", line) for line in speed[1:]]
    assert [c[1:3] for c in cells] == [["4 of 8", "uniform"], ["8 of 8", "markov"], ["-", "uniform"]]


def test_a_note_is_said_once_below() -> None:
    noted = row(note="the graph cannot be captured: a hook synchronises")
    text = table(run(rows=(noted, noted)))
    assert text.count("full algorithm: the graph cannot be captured: a hook synchronises") == 1


def test_a_machine_without_gpu_says_so() -> None:
    text = table(run(gpu=None, gpu_memory=None, driver=None, cuda=None, commit=None, limits={}))
    assert "no GPU, 16 cores of Xeon, 128 GiB\n" in text
    assert "\nPython 3.12.3, torch 2.11.0+cu130, transformers 5.17.0, moeflow 0.1.0\n" in text


# -- the paper ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 3.061),
        ({"expert_scheme": "3-bit g64"}, 2.845),
        ({"strategy": "no-prefetch"}, 2.918),
        ({"strategy": "no-cache", "k": 0}, 2.265),
        ({"strategy": "naive", "k": 0}, 1.392),
        ({"model": "mistralai/Mixtral-8x7B-Instruct-v0.1"}, 3.061),
        ({"expert_scheme": "4-bit g64"}, None),
        ({"expert_scheme": "unquantized"}, None),
        ({"k": 8}, None),
        ({"tokens_per_second": None}, None),
        ({"batch": 2}, None),
        ({"model": "qwen3-30b-a3b"}, None),
    ],
)
def test_the_paper_stands_only_beside_what_it_measured(change: dict[str, Any], expected: float | None) -> None:
    assert paper_speed(row(**change)) == expected


def test_the_papers_rows_are_the_strategies() -> None:
    assert all(set(found) == set(ROWS) for found in A100.values())
    for machines in MEASURED.values():
        assert set(machines) == set(K) <= set(known_hardware())
        for found in machines.values():
            assert list(found) == list(ROWS)[: len(found)], "the 3060 has no naive row at 3 bits"
            assert sorted(found.values(), reverse=True) == list(found.values())
    assert all(sorted(found.values(), reverse=True) == list(found.values()) for found in A100.values())


# -- Markdown and JSON -------------------------------------------------------------------------------------


def test_markdown_has_the_same_cells_as_the_table() -> None:
    text = markdown(run())
    assert text.startswith("## mixtral-8x7b, NVIDIA H100 80GB HBM3, 2026-11-24\n\n`moeflow bench --synthetic ")
    tables = [block for block in blocks(text) if block[0].startswith("|")]
    for block, grid in zip(tables, grids(run()), strict=True):
        assert block[1] == "|---|" + "---:|" * (len(grid.headings) - 1)
        cells = [line.strip("| ").split(" | ") for line in (block[0], *block[2:])]
        assert cells == [[grid.title, *grid.headings[1:]], *map(list, grid.rows)]
    assert max(len(line) for line in text.splitlines() if not line.startswith(("|", "`"))) <= 120
    assert text.endswith("k = 4.\n")


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    text = markdown(run(rows=(row(model="a|b"), row(model="c"))))
    assert r"| a\|b |" in text


def test_the_json_line_is_the_document_and_what_follows_from_it() -> None:
    line = json_line(run())
    assert "\n" not in line
    data = json.loads(line)
    derived = data.pop("derived")
    assert Benchmark.parse(data, "line") == run()
    assert len(derived) == 4
    assert derived[0]["link_efficiency"] == pytest.approx(27.9 * 34 * 55050240 / 54.7e9)
    assert derived[0]["seconds_per_token"] == pytest.approx(1 / 27.9)
    assert json.loads(json_line(run(rows=(row(tokens_per_second=None),))))["derived"][0]["link_rate"] is None


# -- the little ones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, None), (0.0123, "0.0123"), (3.061, "3.06"), (27.94, "27.9"), (99.96, "100"), (1234.5, "1,234")],
)
def test_digits(value: float | None, text: str | None) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, None), (0, "0%"), (0.475, "47.5%"), (0.9999, "100%"), (1.012, "101%"), (12.345, "1,234%")],
)
def test_percent(value: float | None, text: str | None) -> None:
    assert percent(value) == text


def test_lines_break_between_parts() -> None:
    assert fill(listed(["one two", "three four", "five"]), 19) == ["one two,", "three four, five"]
    assert max(map(len, fill(listed(["word " * 20, "end"]), 30))) <= 30


# -- CPU and link ------------------------------------------------------------------------------------------


def compared() -> Benchmark:
    figures = {
        "cpu": {"k": 0, "tokens_per_second": 18.0, "hit_rate": 0.0, "missed_bytes": 0, "computed_bytes": 3.5e9},
        "link": {"tokens_per_second": 30.0, "hit_rate": 0.5, "missed_bytes": 1.75e9},
        "both": {"tokens_per_second": 51.0, "hit_rate": 0.5, "missed_bytes": 0.7e9, "computed_bytes": 1.05e9},
    }
    rows = tuple(row(experts_on=name, strategy="full", **found) for name, found in figures.items())
    return run(rows, {"link_peak": 54.7e9, "memory_bandwidth": 3.05e12, "host_read": 84e9})


def test_rows_that_compare_cpu_and_link_say_so_and_end_with_ratios() -> None:
    text = table(compared())
    found = {g.title: [dict(zip(g.headings, cells, strict=True)) for cells in g.rows] for g in grids(compared())}
    assert [r["misses by"] for r in found["speed"]] == ["CPU alone", "link alone", "CPU and link"]
    assert [r["of link alone"] for r in found["speed"]] == ["60%", "100%", "170%"]
    assert [r["k"] for r in found["speed"]] == ["0 of 8", "4 of 8", "4 of 8"]
    assert found["CPU, per token"][2] == {
        "row": "full algorithm", "misses by": "CPU and link", "k": "4 of 8", "computed": "1,001 MiB",
        "of missed": "60%", "achieved": "53.5 GB/s", "of host's read": "63.7%",
    }  # fmt: skip
    assert found["CPU, per token"][1]["computed"] == "-" and found["CPU, per token"][0]["of missed"] == "100%"
    assert "host memory read at 84 GB/s" in text
    assert "full algorithm: CPU and link together have 1.7 times the link alone and 2.83 times the CPU alone\n" in text
    assert [r["paper, A100"] for r in found["speed"]] == ["-", "3.06", "-"], "the paper's CPU computed nothing"


def test_ratios_are_of_rows_that_nothing_else_tells_apart() -> None:
    whole = compared()
    cpu, link, both = whole.rows
    other = both.model_copy(update={"routing": "markov", "tokens_per_second": 60.0})
    alone = row()
    mixed = whole.model_copy(update={"rows": (cpu, link, both, other, alone)})
    assert mixed.over(both, "link") == pytest.approx(1.7) and mixed.over(both, "cpu") == pytest.approx(51 / 18)
    assert mixed.over(other, "link") is None and mixed.over(alone, "link") is None
    derived = json.loads(json_line(mixed))["derived"]
    assert [d["over_link"] for d in derived] == [pytest.approx(0.6), 1.0, pytest.approx(1.7), None, None]
    assert derived[2]["cpu_share"] == pytest.approx(0.6) and derived[1]["cpu_share"] is None
    assert derived[2]["cpu_efficiency"] == pytest.approx(51 * 1.05 / 84)
    assert "together" not in table(whole.model_copy(update={"rows": (cpu, link)}))
