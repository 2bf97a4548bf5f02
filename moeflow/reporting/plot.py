"""A benchmark as a picture: decode speed by row, the paper's figure beneath each that has one.

Bars carry their figures, so there is no axis to read off; hardware, versions and command stand below, so that the
picture can travel alone. matplotlib is imported when a plot is asked for, and used without its global state.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.errors import UsageError
from moeflow.reporting.cells import digits, fill, listed, machine, percent, settings_of, shared, subject, versions
from moeflow.reporting.paper import ROWS, paper_speed
from moeflow.reporting.picture import FAINT, INK, OURS, PAPER, save
from moeflow.schema import Benchmark, BenchmarkRow
from moeflow.schema.units import format_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

# Inches. A README shows 10 of them at about 830 pixels, where 9 points are still legible.
WIDTH, LABELS, BARS, MARGIN = 10.0, 2.75, 3.6, 0.25
LINE, SMALL = 0.175, 0.155  # between lines of text, and of what stands below a row's name


def plot(run: Benchmark, path: Path) -> None:
    """Write the picture as PNG, atomically.

    Raises:
        UsageError: matplotlib is not installed, `path` is no .png, or no row has a speed.
        StorageError: the file cannot be written.
    """
    if all(row.tokens_per_second is None for row in run.rows):
        raise UsageError(f"{path}: nothing to plot: no row of this benchmark has a speed")
    save(path, lambda: _figure(run))


def _figure(run: Benchmark) -> Figure:
    from matplotlib.figure import Figure

    title = f"Decode speed of {subject(run)}, tokens per second"
    about = shared(run)
    if len(title) > 80:  # several models, which stand beside their rows, or a long path
        title = "Decode speed, tokens per second"
        about = [subject(run), *about]
    settings = fill(listed(about), 124)
    caption = [line for text in (f"{machine(run)}.", f"{versions(run)}; {run.date[:10]}.") for line in fill(text, 140)]
    command = fill(run.command, 122)
    names = [fill(listed(settings_of(run, row)), 40) for row in run.rows]
    rows = len(run.rows) * max(0.72, 0.4 + SMALL * max(map(len, names)))
    foot = 0.2 + LINE * (len(caption) + len(command)) + MARGIN
    height = 0.75 + LINE * len(settings) + rows + foot
    figure = Figure(figsize=(WIDTH, height), facecolor="white")

    def write(lines: list[str], top: float, size: float, color: str, **style: Any) -> float:
        """Lines from `top` inches below the upper edge; returns where they end."""
        for line in lines:
            figure.text(MARGIN / WIDTH, 1 - top / height, line, fontsize=size, color=color, va="top", **style)
            top += LINE
        return top

    write([title], MARGIN, 14, INK, weight="bold")
    write(settings, 0.58, 9.5, FAINT)
    end = write(caption, height - foot + 0.2, 8.5, FAINT)
    write(command, end, 8.5, FAINT, family="monospace")
    axes = figure.add_axes((LABELS / WIDTH, foot / height, (WIDTH - LABELS) / WIDTH, rows / height))
    _bars(axes, run, names)
    return figure


def _bars(axes: Axes, run: Benchmark, names: list[list[str]]) -> None:
    speeds = [row.tokens_per_second for row in run.rows if row.tokens_per_second]
    papers = [paper_speed(row) for row in run.rows]
    axes.set_xlim(0, max(*speeds, *(paper or 0 for paper in papers)) * (WIDTH - LABELS) / BARS)
    axes.set_ylim(len(run.rows) - 0.5, -0.5)
    axes.set_axis_off()
    axes.axvline(0, color=FAINT, linewidth=0.8)
    unexplained = True
    for place, (row, paper) in enumerate(zip(run.rows, papers, strict=True)):
        middle = place - 0.1 if paper else float(place)  # leaves room for the paper's bar
        _name(axes, middle, ROWS[row.strategy], names[place])
        _bar(axes, middle, run, row)
        if paper:
            axes.barh(place + 0.27, paper, height=0.17, color=PAPER)
            text = f"{digits(paper)}  paper, A100" if unexplained else str(digits(paper))
            axes.annotate(
                text, (paper, place + 0.27), (5, 0), textcoords="offset points", va="center_baseline", fontsize=9,
                color=FAINT,
            )  # fmt: skip
            unexplained = False


def _bar(axes: Axes, middle: float, run: Benchmark, row: BenchmarkRow) -> None:
    """The row's bar, its figure, and what explains it."""
    speed = row.tokens_per_second
    axes.barh(middle, speed or 0, height=0.44, color=OURS)
    label = axes.annotate(
        digits(speed) or "not measured", (speed or 0, middle), (5, 0), textcoords="offset points",
        va="center_baseline", fontsize=12 if speed else 9, weight="bold" if speed else "normal", color=INK,
    )  # fmt: skip
    axes.annotate(
        _facts(run, row), (1, middle), (7, 0), xycoords=(label, "data"), textcoords="offset points",
        va="center_baseline", fontsize=9, color=FAINT,
    )  # fmt: skip


def _name(axes: Axes, middle: float, name: str, settings: list[str]) -> None:
    """The row's name, and below it in small what sets it apart from other rows."""
    line = 72 * SMALL
    lift = line * len(settings) / 2
    axes.annotate(
        name, (0, middle), (-8, lift), textcoords="offset points", ha="right", va="center_baseline", fontsize=11,
        color=INK,
    )  # fmt: skip
    for number, text in enumerate(settings, start=1):
        axes.annotate(
            text, (0, middle), (-8, lift - line * number - 1), textcoords="offset points", ha="right",
            va="center_baseline", fontsize=8.5, color=FAINT,
        )  # fmt: skip


def _facts(run: Benchmark, row: BenchmarkRow) -> str:
    """Why it is as fast as it is: hits, and which limit it is near."""
    link, memory = run.link_efficiency(row), run.memory_efficiency(row)
    parts = [f"{percent(row.hit_rate)} hits" if row.hit_rate is not None else ""]
    if row.link_rate and link is not None:
        parts.append(f"link {format_rate(row.link_rate)}, {percent(link)} of peak")
    elif row.memory_rate and memory is not None:
        parts.append(f"memory {format_rate(row.memory_rate)}, {percent(memory)} of peak")
    return "; ".join(part for part in parts if part)
