"""Benchmarks: what was not measured is None, what follows from figures follows, and nothing impossible gets in."""

from __future__ import annotations

from typing import Any

import pytest

from moeflow.errors import DocumentError
from moeflow.schema import Benchmark, BenchmarkRow, Environment, Limits

MACHINE = Environment(
    gpu=None, cpu="Xeon", cores=2, ram=8 << 30, python="3.11", torch="2.13", transformers="5.23", moeflow="0.1"
)
SETTINGS: dict[str, Any] = {
    "model": "mixtral-8x7b", "experts": 8, "top_k": 2, "expert_scheme": "2-bit g64", "attention_scheme": "unquantized",
    "strategy": "full", "execution": "host", "k": 4, "routing": "model", "prompt_tokens": 4, "tokens": 8, "batch": 1,
}  # fmt: skip
FIGURES = [n for n, field in BenchmarkRow.model_fields.items() if field.default is None and n != "recall"]


def row(**figures: Any) -> BenchmarkRow:
    return BenchmarkRow(**{**SETTINGS, **figures})


def benchmark(*rows: BenchmarkRow, **limits: float) -> Benchmark:
    return Benchmark(
        command="moeflow bench", date="2026-01-02T03:04:05Z", environment=MACHINE, limits=Limits(**limits), rows=rows
    )


def test_what_was_not_measured_is_none_and_so_is_what_would_follow() -> None:
    empty = row()
    assert len(FIGURES) >= 15
    assert {getattr(empty, name) for name in FIGURES} == {None}
    derived = (empty.seconds_per_token, empty.moved_bytes, empty.link_rate, empty.memory_rate, empty.memory_ratio)
    run = benchmark(empty)
    rates = (run.link_efficiency(empty), run.memory_efficiency(empty))
    assert {*derived, *rates, run.prefill_excess(empty), run.cold_prefill_excess(empty)} == {None}


def test_figures_follow_from_each_other() -> None:
    measured = row(
        tokens_per_second=20.0, batch=4, missed_bytes=1.5e9, guessed_bytes=0.5e9, read_bytes=4e9, prefill_bytes=15e9,
        time_to_first_token=0.6, cold_time_to_first_token=0.5, cold_prefill_bytes=20e9, memory_planned=100,
        memory_in_use=103,
    )  # fmt: skip
    run = benchmark(measured, link_peak=50e9, memory_bandwidth=320e9)
    assert measured.seconds_per_token == pytest.approx(0.2)
    assert measured.moved_bytes == 2e9
    assert measured.link_rate == 40e9
    assert run.link_efficiency(measured) == pytest.approx(0.8)
    assert measured.memory_rate == 80e9
    assert run.memory_efficiency(measured) == pytest.approx(0.25)
    assert run.prefill_excess(measured) == pytest.approx(0.6 / 0.3)
    assert run.cold_prefill_excess(measured) == pytest.approx(0.5 / 0.4)
    assert measured.memory_ratio == pytest.approx(1.03)


def test_nothing_moved_is_a_measurement() -> None:
    all_hits = row(tokens_per_second=200.0, missed_bytes=0, hit_rate=1.0)
    assert (all_hits.moved_bytes, all_hits.link_rate) == (0, 0)
    assert benchmark(all_hits, link_peak=5e10).link_efficiency(all_hits) == 0


@pytest.mark.parametrize("name", ["tokens_per_second", "time_to_first_token", "cold_time_to_first_token"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf")])
def test_a_speed_or_time_is_never_zero(name: str, value: float) -> None:
    data = benchmark(row()).to_dict()
    data["rows"][0][name] = value
    with pytest.raises(DocumentError, match=rf"b\.json: rows\.0\.{name} is "):
        Benchmark.parse(data, "b.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("rows", 0, "hit_rate"), 1.2, r"rows\.0\.hit_rate is 1\.2; input should be less than or equal to 1"),
        (("rows", 0, "recall"), -0.1, r"rows\.0\.recall is -0\.1"),
        (("rows", 0, "missed_bytes"), -1, r"rows\.0\.missed_bytes is -1"),
        (("rows", 0, "guesses"), 1.5, r"rows\.0\.guesses is 1\.5"),
        (("rows", 0, "routing"), "random", "routing is random; it supports model, uniform, markov, recorded"),
        (("rows",), [], r"rows is \[\]"),
        (("date",), "yesterday", "date is yesterday"),
        (("limits", "link_peak"), 0, r"limits\.link_peak is 0"),
        (("rows", 0, "speed"), 1, r"rows\.0\.speed: unknown key"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(place: tuple[Any, ...], value: Any, message: str) -> None:
    data: Any = benchmark(row()).to_dict()
    target = data
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    with pytest.raises(DocumentError, match=message):
        Benchmark.parse(data, "b.json")
