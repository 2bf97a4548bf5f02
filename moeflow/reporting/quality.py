"""An evaluation as text: quality beside bytes and speed, and the paper's layout of a grid of bits.

A figure that no row has gets no column. Both forms say the protocol, without which a perplexity means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from moeflow.reporting.cells import MISSING, Grid, digits, fill, hardware, percent, versions
from moeflow.reporting.text import aligned, piped
from moeflow.schema import Evaluated, Evaluation
from moeflow.schema.units import format_size

__all__ = ["about", "json_line", "markdown", "perplexity", "table"]

WIDTH = 120


def table(run: Evaluation) -> str:
    """For a terminal; ends with a newline."""
    lines = [*fill(f"{run.model}: {about(run)}", WIDTH), *fill(f"{hardware(run.environment)}; {versions(run)}", WIDTH)]
    lines += [f"{run.date}  {run.command}"]
    for grid in _grids(run):
        lines += ["", *aligned(grid)]
    return "\n".join([*lines, "", *fill(_remark(run), WIDTH)]) + "\n"


def markdown(run: Evaluation) -> str:
    """A section: heading, command, protocol and machine, tables; ends with a newline."""
    lines = [f"## {run.model} on {run.protocol.text}, {run.date[:10]}", "", f"`{run.command}`", ""]
    lines += fill(f"{about(run)}. {hardware(run.environment)}; {versions(run)}.", WIDTH)
    for grid in _grids(run):
        lines += ["", *piped(grid)]
    return "\n".join([*lines, "", *fill(f"{_remark(run)}.", WIDTH)]) + "\n"


def json_line(run: Evaluation) -> str:
    """The document on one line, with what follows from its rows under `derived`; without that key it parses back."""
    derived = [
        {
            "perplexity": run.perplexity(row),
            "mean_kl": run.mean_kl(row),
            "agreement": run.agreement(row),
            "expert_bits": row.expert_bits,
            "bits": row.bits,
            "tokens_per_second": row.tokens_per_second,
        }
        for row in run.rows
    ]
    return json.dumps({**run.to_dict(), "derived": derived}, ensure_ascii=False)


def about(run: Evaluation) -> str:
    """The text and the protocol."""
    cut = run.protocol
    return (
        f"{cut.text}, {cut.tokens:,} tokens, of which {cut.scored:,} are counted: windows of {cut.context:,}, "
        f"stride {cut.stride:,}"
    )


def perplexity(run: Evaluation, row: Evaluated) -> str:
    """Four digits: the differences are small."""
    value = run.perplexity(row)
    return f"{value:,.0f}" if value >= 9999.5 else f"{value:.4g}"


def _remark(run: Evaluation) -> str:
    said = "sizes count scales, zeros and padding; tokens/s of many tokens at once, as in prefill, overlap included"
    if any(row.divergence for row in run.rows):
        said = f"KL: of the model's predictions from the unquantized one's, nats a token; {said}"
    return said


def _grids(run: Evaluation) -> list[Grid]:
    rows = list(run.rows)
    figures: dict[str, Callable[[Evaluated], str | None]] = {
        "perplexity": lambda row: perplexity(run, row),
        "KL": lambda row: digits(run.mean_kl(row)),
        "same top token": lambda row: percent(run.agreement(row)),
        "experts": lambda row: format_size(row.expert_nbytes),
        "bits a weight": lambda row: f"{row.expert_bits:.2f}",
        "all weights": lambda row: format_size(row.nbytes),
        "tokens/s": lambda row: digits(row.tokens_per_second),
        "on": lambda row: f"{row.device}, {row.dtype}",
    }
    known = {heading: [text(row) for row in rows] for heading, text in figures.items()}
    columns = {heading: [cell or MISSING for cell in cells] for heading, cells in known.items() if any(cells)}
    labels = [row.quantization for row in rows]
    cells = tuple(zip(labels, *columns.values(), strict=True))
    found = [Grid("quantization", ("quantization", *columns), cells, 1)]
    return [*found, *_table_1(run)]


def _table_1(run: Evaluation) -> list[Grid]:
    """Attention down, experts across, where there are several of each: the paper's table 1."""
    experts = list(dict.fromkeys(row.experts for row in run.rows))
    attention = list(dict.fromkeys(row.attention for row in run.rows))
    cells = {(row.attention, row.experts): row for row in run.rows}
    if len(run.rows) < len(experts) + len(attention) or len(cells) < len(run.rows):
        return []  # one row or column, a model beside its reference, or roles that differ beside these two

    def cell(row: Evaluated | None) -> str:
        return f"{format_size(row.nbytes)} / {perplexity(run, row)}" if row else MISSING

    rows = tuple((down, *(cell(cells.get((down, across))) for across in experts)) for down in attention)
    return [Grid("attention \\ experts, size / perplexity", ("attention", *experts), rows, 1)]
