"""What all pictures share: colours, axes between a title and what must be known beside, a PNG that is whole or absent.

matplotlib is imported when a picture is asked for, and used without its global state or anybody's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeflow.errors import UsageError
from moeflow.files import atomic_writer
from moeflow.reporting.cells import fill

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FAINT", "INK", "OURS", "PAPER", "check", "framed", "save"]

DPI = 160
WIDTH, MARGIN, LINE = 10.0, 0.25, 0.175  # inches
INK, FAINT, OURS, PAPER = "#1c2733", "#64707d", "#1f5f99", "#b9c3cd"


def check(path: Path) -> None:
    """Whether a picture can be made, before long work.

    Raises:
        UsageError: matplotlib is not installed, or `path` is no .png.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: a plot is written as PNG; end its name in .png")
    try:
        import matplotlib.style  # noqa: F401
    except ImportError as error:
        raise UsageError("a plot needs matplotlib, which is not installed: pip install moeflow[plot]") from error


def framed(title: str, about: Sequence[str], command: str, high: float, left: float = 0.75) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, and below them what lets the picture travel alone.

    Args:
        title: above the axes.
        about: sentences below them, wrapped.
        command: that gave the figures, below the sentences.
        high: inches of the axes.
        left: inches that the labels of the vertical axis take.
    """
    from matplotlib.figure import Figure

    caption = [line for text in about for line in fill(text, 140)]
    commands = fill(command, 122)
    foot = MARGIN + LINE * (len(caption) + len(commands))
    bottom, top = foot + 0.65, 0.75
    height = bottom + high + top
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    figure.text(MARGIN / WIDTH, 1 - MARGIN / height, title, fontsize=14, color=INK, va="top", weight="bold")
    for number, text in enumerate([*caption, *commands]):
        family = "monospace" if number >= len(caption) else "sans-serif"
        place = (foot - LINE * number) / height
        figure.text(MARGIN / WIDTH, place, text, fontsize=8.5, color=FAINT, va="top", family=family)
    axes = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + MARGIN) / WIDTH, high / height))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def save(path: Path, make: Callable[[], Figure]) -> None:
    """Write what `make` draws as PNG, atomically.

    Raises:
        UsageError: as `check`.
        StorageError: the file cannot be written.
    """
    check(path)
    import matplotlib.style

    with matplotlib.style.context("default"), atomic_writer(path) as stream:  # whatever a matplotlibrc says
        make().savefig(stream, format="png", dpi=DPI)
