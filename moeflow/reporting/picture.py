"""What all pictures share: colours, and a PNG that is whole or absent.

matplotlib is imported when a picture is asked for, and used without its global state or anybody's settings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moeflow.errors import UsageError
from moeflow.files import atomic_writer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FAINT", "INK", "OURS", "PAPER", "check", "save"]

DPI = 160
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
