"""A replay of routes as a picture: hit rate over k, a line for each policy, the optimum above them.

A shade shows how far the layers lie apart. What was replayed stands below, so that the picture can travel alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeflow.reporting.picture import FAINT, INK, OURS, framed, save
from moeflow.reporting.simulation import guessed, remarks, subject
from moeflow.schema import SimulatedRow, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

HIGH = 3.2  # inches of the axes
LOOKS = {
    "lru": (OURS, "-", "o"), "lfu": ("#b5651d", "-", "s"), "mix": ("#3b7a57", "-", "D"),
    "static": ("#7a4f9a", "-", "v"), "optimum": (FAINT, "--", "^"),
}  # fmt: skip
SHADES = ("#3b7a57", "#8fb339", "#1f9e9e", "#a3a380")  # of one mix and the next


def plot(found: Simulation, path: Path) -> None:
    """Write the picture as PNG, atomically.

    Raises:
        UsageError: matplotlib is not installed, or `path` is no .png.
        StorageError: the file cannot be written.
    """
    save(path, lambda: _figure(found))


def _figure(found: Simulation) -> Figure:
    about = [subject(found), *([f"guesses: {guessed(found)}"] if found.guessing else []), *remarks(found, speeds=False)]
    title = "Share of expert uses that find their expert cached"
    figure, axes = framed(title, [f"{text}." for text in about], found.command, HIGH)
    _lines(axes, found)
    return figure


def _lines(axes: Axes, found: Simulation) -> None:
    """A line for each policy; dotted in its colour, what is cached or was guessed in time."""
    from matplotlib.ticker import MaxNLocator

    lines: dict[tuple[str, bool], list[SimulatedRow]] = {}
    for row in sorted((row for row in found.rows if row.quotas is None), key=lambda row: row.k):
        lines.setdefault((row.label, row.guesses is not None), []).append(row)
    mixes = list(dict.fromkeys(row.label for row in found.rows if row.policy == "mix"))
    for (policy, guesses), rows in lines.items():
        color, style, marker = LOOKS[rows[0].policy]
        if policy in mixes:
            color = SHADES[mixes.index(policy) % len(SHADES)]
        ks, rates = [row.k for row in rows], [100 * found.served_rate(row) for row in rows]
        name = f"{policy}, hit or foreseen" if guesses else policy
        axes.plot(ks, rates, color=color, linestyle=":" if guesses else style, marker=marker, markersize=4, label=name)
        if policy != "optimum" and not guesses:
            layers = [found.layer_hit_rates(row) for row in rows]
            least, most = ([100 * pick(shares) for shares in layers] for pick in (min, max))
            axes.fill_between(ks, least, most, color=color, alpha=0.12, linewidth=0, label=f"{policy}, its layers")
    axes.set_xlabel(f"experts cached per layer, of {found.experts}", color=INK)
    axes.set_ylabel("hits, %", color=INK)
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=FAINT, alpha=0.2)
    axes.legend(frameon=False, loc="lower right", fontsize=9)  # more slots hit more: that corner stays empty
