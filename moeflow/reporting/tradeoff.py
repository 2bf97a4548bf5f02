"""An evaluation as a picture: perplexity over size, a line for each scheme of the attention, a point for each packing.

Protocol, hardware and command stand below, so that the picture can travel alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeflow.reporting.cells import hardware, versions
from moeflow.reporting.picture import FAINT, INK, OURS, framed, save
from moeflow.reporting.quality import about, perplexity
from moeflow.schema import Evaluated, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

HIGH = 3.6  # inches of the axes
COLORS = (OURS, "#b5651d", "#4b7f52", "#7a4b8f", "#a03b4a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PLAIN = "unquantized"
FEW = 4  # points that bear their figures: more would cover each other


def plot(run: Evaluation, path: Path) -> None:
    """Write the picture as PNG, atomically.

    Raises:
        UsageError: matplotlib is not installed, or `path` is no .png.
        StorageError: the file cannot be written.
    """
    save(path, lambda: _figure(run))


def _figure(run: Evaluation) -> Figure:
    said = (f"{run.model}: {about(run)}.", f"{hardware(run.environment)}; {versions(run)}; {run.date[:10]}.")
    figure, axes = framed("Perplexity over size", said, run.command, HIGH, left=0.85)
    _points(axes, run)
    return figure


def _points(axes: Axes, run: Evaluation) -> None:
    """A line for each scheme of the attention, from fewest bytes to most; a marker for each of the experts."""
    from matplotlib.lines import Line2D

    unit, step = ("GiB", 1 << 30) if max(row.nbytes for row in run.rows) >= 1 << 30 else ("MiB", 1 << 20)
    schemes = dict.fromkeys(row.experts for row in run.rows)
    markers = {experts: MARKERS[number % len(MARKERS)] for number, experts in enumerate(schemes)}
    lines: dict[str, list[Evaluated]] = {}
    for row in sorted(run.rows, key=lambda row: row.nbytes):
        lines.setdefault(row.attention, []).append(row)
    for number, (attention, rows) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        sizes, values = [row.nbytes / step for row in rows], [run.perplexity(row) for row in rows]
        axes.plot(sizes, values, color=color, label=f"attention {attention}")
        for row, x, y in zip(rows, sizes, values, strict=True):
            axes.scatter([x], [y], color=color, marker=markers[row.experts], zorder=3)
            if len(run.rows) <= FEW:
                axes.annotate(
                    perplexity(run, row), (x, y), (0, 7), textcoords="offset points", fontsize=9, color=color,
                    ha="center",
                )  # fmt: skip
    for row in run.rows:
        if row.experts == row.attention == PLAIN:
            axes.axhline(run.perplexity(row), color=FAINT, linewidth=0.8, linestyle="--")
    named = [
        Line2D([], [], color=INK, marker=marker, linestyle="", label=f"experts {experts}")
        for experts, marker in markers.items()
    ]
    axes.legend(handles=[*axes.get_legend_handles_labels()[0][: len(lines)], *named], frameon=False, fontsize=9)
    axes.set_xlabel(f"all weights, {unit}", color=INK)
    axes.set_ylabel("perplexity of a token", color=INK)
    axes.margins(x=0.08, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
