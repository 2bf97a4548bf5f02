"""An engine for a command: loaded with a progress bar, and a word where it will be slower than planned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeflow.engine import Engine

__all__ = ["load"]


def load(artifact: Path, **changes: Any) -> Engine:
    """As `pipeline.load`."""
    from moeflow import pipeline
    from moeflow.console import progress_bar, say

    with progress_bar() as progress:
        engine = pipeline.load(artifact, progress=progress, **changes)
    if engine.note:
        say(engine.note)
    return engine
