"""What is said of a benchmark's rows: settings and figures as short texts, in the order in which people want them.

A setting that all rows share is said once, as a phrase; one that differs becomes a column. A figure that no row has
gets no column, and a single one that is missing shows as a dash. Tables and plots differ in nothing but layout.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from moeflow.reporting.paper import ROWS, paper_speed
from moeflow.schema import Benchmark, BenchmarkRow, Environment, Evaluation, TaskEvaluation
from moeflow.schema.units import format_rate, format_size

__all__ = [
    "EXPERTS_ON",
    "MISSING",
    "ROUTING",
    "Grid",
    "digits",
    "fill",
    "grids",
    "hardware",
    "listed",
    "machine",
    "percent",
    "remarks",
    "settings_of",
    "shared",
    "subject",
    "versions",
]

MISSING = "-"
EXPERTS_ON = {"cpu": "CPU alone", "link": "link alone", "both": "CPU and link"}
ROUTING = {
    "model": "the model's own routing",
    "uniform": "uniform routing",
    "markov": "Markov routing (Mixtral's repetition)",
    "recorded": "recorded routing",
}


@dataclass(frozen=True)
class _Setting:
    """Something that was chosen; `text` is None where it does not apply to a row."""

    heading: str
    text: Callable[[BenchmarkRow], str | None]
    phrase: str
    """What the text is put into, at {}, where there is no heading above it."""


@dataclass(frozen=True)
class _Figure:
    """Something that was measured, None where it was not."""

    heading: str
    text: Callable[[Benchmark, BenchmarkRow], str | None]


@dataclass(frozen=True)
class Grid:
    """A table as texts."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    """How many of the first columns are words, to be aligned left."""


def digits(value: float | None) -> str | None:
    """Three significant digits."""
    return None if value is None else f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def percent(value: float | None) -> str | None:
    """A share in percent, to three digits."""
    return None if value is None else f"{100 * value:.3g}%" if value < 9.995 else f"{100 * value:,.0f}%"


def _size(value: float | None) -> str | None:
    return None if value is None else format_size(value)


def _rate(value: float | None) -> str | None:
    return None if value is None else format_rate(value)


def _milliseconds(value: float | None) -> str | None:
    return digits(None if value is None else 1000 * value)


def _k(row: BenchmarkRow) -> str | None:
    return f"{row.k:.3g} of {row.experts}" if row.strategy in ("full", "no-prefetch") else None


def _used(row: BenchmarkRow) -> str | None:
    if row.guesses is None or row.guesses_used is None:
        return None
    return f"{row.guesses_used:,} of {row.guesses:,}"


SETTINGS = (
    _Setting("model", lambda row: row.model, "{}"),
    _Setting("weights", lambda row: "random" if row.synthetic else "its own", "{} weights"),
    _Setting("experts", lambda row: row.expert_scheme, "{} experts"),
    _Setting("attention", lambda row: row.attention_scheme, "{} attention"),
    _Setting("misses by", lambda row: EXPERTS_ON[row.experts_on] if row.experts_on else None, "misses by {}"),
    _Setting("k", _k, "k = {}"),
    _Setting("routing", lambda row: row.routing, "{}"),
    _Setting("recall", lambda row: percent(row.recall), "{} of guesses right"),
    _Setting("driven by", lambda row: row.execution, "{}-driven"),
    _Setting("batch", lambda row: str(row.batch), "batch {}"),
    _Setting("prompt", lambda row: str(row.prompt_tokens), "prompt of {}"),
    _Setting("decoded", lambda row: str(row.tokens), "{} tokens decoded"),
)
FIGURES = {
    "speed": (
        _Figure("tokens/s", lambda _, row: digits(row.tokens_per_second)),
        _Figure("paper, A100", lambda _, row: digits(paper_speed(row))),
        _Figure("ms/token", lambda _, row: _milliseconds(row.seconds_per_token)),
        _Figure("hits", lambda _, row: percent(row.hit_rate)),
        _Figure("of link alone", lambda run, row: percent(run.over(row, "link"))),
    ),
    "prefill": (
        _Figure("first token, ms", lambda _, row: _milliseconds(row.time_to_first_token)),
        _Figure("moved", lambda _, row: _size(row.prefill_bytes)),
        _Figure("of link's time", lambda run, row: percent(run.prefill_excess(row))),
        _Figure("cold, ms", lambda _, row: _milliseconds(row.cold_time_to_first_token)),
        _Figure("moved, cold", lambda _, row: _size(row.cold_prefill_bytes)),
        _Figure("of link's time, cold", lambda run, row: percent(run.cold_prefill_excess(row))),
    ),
    "link, per token": (
        _Figure("missed", lambda _, row: _size(row.missed_bytes)),
        _Figure("guessed", lambda _, row: _size(row.guessed_bytes)),
        _Figure("wasted", lambda _, row: _size(row.wasted_bytes)),
        _Figure("streamed", lambda _, row: _size(row.streamed_bytes)),
        _Figure("achieved", lambda _, row: _rate(row.link_rate)),
        _Figure("of peak", lambda run, row: percent(run.link_efficiency(row))),
        _Figure("guesses used, in all", lambda _, row: _used(row)),
    ),
    "CPU, per token": (
        _Figure("computed", lambda _, row: _size(row.computed_bytes)),
        _Figure("of missed", lambda _, row: percent(row.cpu_share)),
        _Figure("achieved", lambda _, row: _rate(row.cpu_rate)),
        _Figure("of host's read", lambda run, row: percent(run.cpu_efficiency(row))),
    ),
    "memory": (
        _Figure("read per token", lambda _, row: _size(row.read_bytes)),
        _Figure("achieved", lambda _, row: _rate(row.memory_rate)),
        _Figure("of bandwidth", lambda run, row: percent(run.memory_efficiency(row))),
        _Figure("device, in use", lambda _, row: _size(row.memory_in_use)),
        _Figure("of plan", lambda _, row: percent(row.memory_ratio)),
        _Figure("host, in use", lambda _, row: _size(row.host_in_use)),
        _Figure("blobs", lambda _, row: _size(row.host_planned)),
    ),
}


def subject(run: Benchmark) -> str:
    """The model, or the models."""
    return ", ".join(dict.fromkeys(row.model for row in run.rows))


def shared(run: Benchmark) -> list[str]:
    """Settings that all rows share, beside the model."""
    return [_phrase(s, next(iter(found))) for s in SETTINGS[1:] if len(found := _values(run, s)) == 1]


def settings_of(run: Benchmark, row: BenchmarkRow) -> list[str]:
    """What distinguishes this row's settings from other rows', beside its strategy."""
    differing = (s for s in SETTINGS if len(_values(run, s)) > 1)
    return [_phrase(s, text) for s in differing if (text := s.text(row)) is not None]


def _phrase(setting: _Setting, text: str) -> str:
    return ROUTING[text] if setting.heading == "routing" else setting.phrase.format(text)


def _values(run: Benchmark, setting: _Setting) -> set[str]:
    return {text for row in run.rows if (text := setting.text(row)) is not None}


def grids(run: Benchmark) -> list[Grid]:
    """The rows as tables, one per group of figures: the row's name, settings that differ, what was measured."""
    words = [("row", [ROWS[row.strategy] for row in run.rows])]
    for setting in SETTINGS:
        if len(_values(run, setting)) > 1:
            words.append((setting.heading, [setting.text(row) or MISSING for row in run.rows]))
    found = []
    for title, figures in FIGURES.items():
        texts = [(figure.heading, [figure.text(run, row) for row in run.rows]) for figure in figures]
        known = [(heading, [t or MISSING for t in column]) for heading, column in texts if any(column)]
        if known:
            headings, columns = zip(*words, *known, strict=True)
            found.append(Grid(title, headings, tuple(zip(*columns, strict=True)), len(words)))
    return found


def machine(run: Benchmark) -> str:
    """Hardware, and its limits as measured beside the rows."""
    text, limits = hardware(run.environment), run.limits
    if limits.link_peak:
        text += f"; copy engine at 1 GiB {_rate(limits.link_peak)}"
    if limits.memory_bandwidth:
        text += f"; device memory {_rate(limits.memory_bandwidth)}"
    if limits.host_read and run.environment.gpu:
        text += f"; host memory read at {_rate(limits.host_read)}"
    return text


def hardware(where: Environment) -> str:
    """GPU, CPU and memory."""
    memory = f" ({_size(where.gpu_memory)})" if where.gpu_memory else ""
    parts = [f"{where.gpu}{memory}" if where.gpu else "no GPU", f"{where.cores} cores of {where.cpu}"]
    return f"{', '.join(parts)}, {_size(where.ram)}"


def versions(run: Benchmark | Evaluation | TaskEvaluation) -> str:
    """Of everything that the figures depend on."""
    where = run.environment
    parts = [
        f"driver {where.driver}" if where.driver else "",
        f"Python {where.python}",
        f"torch {where.torch}" + (f" (CUDA {where.cuda})" if where.cuda else ""),
        f"transformers {where.transformers}",
        f"moeflow {where.moeflow}" + (f" at {where.commit}" if where.commit else ""),
    ]
    return ", ".join(part for part in parts if part)


def remarks(run: Benchmark) -> list[str]:
    """What a reader must know of single rows, each once."""
    found = dict.fromkeys(f"{ROWS[row.strategy]}: {row.note}" for row in run.rows if row.note)
    found |= dict.fromkeys(_ratios(run))
    if any(paper_speed(row) is not None for row in run.rows):
        found["paper: arXiv 2312.17238, table 2: Mixtral-8x7B on an A100-80GB-SXM, k = 4"] = None
    return list(found)


def _ratios(run: Benchmark) -> Iterator[str]:
    """Of both together to each alone."""
    for row in run.rows:
        over = {other: run.over(row, other) for other in ("link", "cpu")} if row.experts_on == "both" else {}
        if parts := [f"{digits(ratio)} times the {EXPERTS_ON[other]}" for other, ratio in over.items() if ratio]:
            yield f"{ROWS[row.strategy]}: CPU and link together have {' and '.join(parts)}"


def listed(parts: Iterable[str]) -> str:
    """`parts` with commas between them, for `fill`, which breaks lines there and not inside a part of usual length."""
    return ", ".join(part.replace(" ", "\xa0") if len(part) <= 40 else part for part in parts)


def fill(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters."""
    return [line.replace("\xa0", " ") for line in textwrap.wrap(text, width, break_on_hyphens=False)]
