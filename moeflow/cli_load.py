"""An engine for a command: loaded with a progress bar, and a word where it will be slower than planned.

And options that commands share.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from moeflow.engine import Engine

__all__ = ["Cpu", "Threads", "load"]

Cpu = Annotated[
    Literal["auto", "off", "on", "only"] | None,
    typer.Option(
        help="Whether the CPU computes experts that the device lacks: beside a GPU a share (on) or all (only)."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Of the CPU, that compute experts.")]


def load(artifact: Path, **changes: Any) -> Engine:
    """As `pipeline.load`."""
    from moeflow import pipeline
    from moeflow.console import progress_bar, say

    with progress_bar() as progress:
        engine = pipeline.load(artifact, progress=progress, **changes)
    if engine.note:
        say(engine.note)
    return engine
