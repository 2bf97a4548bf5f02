"""A benchmark as text: aligned tables for terminals, Markdown for docs/benchmarks.md, a line of JSON for programs."""

from __future__ import annotations

import json

from moeflow.reporting.cells import Grid, fill, grids, listed, machine, remarks, shared, subject, versions
from moeflow.schema import Benchmark

__all__ = ["aligned", "piped", "table", "markdown", "json_line"]

WIDTH = 120


def table(run: Benchmark) -> str:
    """What ran, where, and the rows, for a terminal; ends with a newline."""
    about = (listed([subject(run), *shared(run)]), machine(run), versions(run))
    lines = [*(line for text in about for line in fill(text, WIDTH)), f"{run.date}  {run.command}"]
    for grid in grids(run):
        lines += ["", *aligned(grid)]
    for remark in remarks(run):
        lines += ["", *fill(remark, WIDTH)]
    return "\n".join(lines) + "\n"


def aligned(grid: Grid) -> list[str]:
    """Columns two spaces apart, words to the left, figures to the right; the title stands over the first."""
    lines = [(grid.title, *grid.headings[1:]), *grid.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(grid.headings))]
    sides = ["<" if i < grid.words else ">" for i in range(len(grid.headings))]
    return ["  ".join(f"{t:{s}{w}}" for t, s, w in zip(line, sides, widths, strict=True)).rstrip() for line in lines]


def piped(grid: Grid) -> list[str]:
    """The same as a table in Markdown."""
    cells = [(grid.title, *grid.headings[1:]), *grid.rows]
    rule = ["---"] * grid.words + ["---:"] * (len(grid.headings) - grid.words)
    found = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in cells]
    return [found[0], f"|{'|'.join(rule)}|", *found[1:]]


def markdown(run: Benchmark) -> str:
    """A section of docs/benchmarks.md: heading, command, settings and machine, tables; ends with a newline."""
    lines = [
        f"## {subject(run)}, {run.environment.gpu or run.environment.cpu}, {run.date[:10]}",
        "",
        f"`{run.command}`",
        "",
    ]
    lines += [*fill(f"{listed(shared(run))}.", WIDTH), "", *fill(f"{machine(run)}; {versions(run)}.", WIDTH)]
    for grid in grids(run):
        lines += ["", *piped(grid)]
    for remark in remarks(run):
        lines += ["", *fill(f"{remark}.", WIDTH)]
    return "\n".join(lines) + "\n"


def json_line(run: Benchmark) -> str:
    """The document on one line, with what follows from its rows under `derived`; without that key it parses back."""
    derived = [
        {
            "seconds_per_token": row.seconds_per_token,
            "moved_bytes": row.moved_bytes,
            "link_rate": row.link_rate,
            "link_efficiency": run.link_efficiency(row),
            "cpu_rate": row.cpu_rate,
            "cpu_share": row.cpu_share,
            "cpu_efficiency": run.cpu_efficiency(row),
            "over_link": run.over(row, "link"),
            "over_cpu": run.over(row, "cpu"),
            "memory_rate": row.memory_rate,
            "memory_efficiency": run.memory_efficiency(row),
            "memory_ratio": row.memory_ratio,
            "prefill_excess": run.prefill_excess(row),
            "cold_prefill_excess": run.cold_prefill_excess(row),
        }
        for row in run.rows
    ]
    return json.dumps({**run.to_dict(), "derived": derived}, ensure_ascii=False)
