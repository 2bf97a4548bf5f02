"""`moeflow trace`: the routes of a text, written to a file that `simulate` and `bench` replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeflow.errors import UsageError

__all__ = ["trace"]


def trace(
    artifact: Annotated[Path, typer.Argument(help="Directory that `moeflow pack` wrote.", show_default=False)],
    text: Annotated[Path, typer.Option(help="A text file (UTF-8), read through from its start.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace to write (.npz).", show_default=False)],
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", min=1, help="Only the first so many; default: the whole text.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Plan anew for this machine: a name in hardware/, a path, or auto (probe).")
    ] = None,
) -> None:
    """Record which experts each token of a text uses in each layer. The file holds expert ids, no text."""
    from moeflow import cli_load
    from moeflow.console import err, say
    from moeflow.offload.trace import save_trace
    from moeflow.recording import check_writable, trace_text

    content = _read(text)
    check_writable(output)

    def report(done: int, total: int) -> None:
        status.update(f"tracing: {done:,} of {total:,} tokens")

    with cli_load.load(artifact, hardware=hardware, record_routes=True) as engine, err.status("tracing") as status:
        try:
            found = trace_text(engine, content, tokens, report=report)
        except UsageError as error:
            raise UsageError(f"{text}: {error}") from error
    save_trace(output, found)
    count, layers, top_k = found.routes.shape
    say(f"wrote {output}: {count:,} tokens, {layers} layers, top-{top_k} of {found.experts} experts")


def _read(path: Path) -> str:
    from moeflow.files import read_text

    content = read_text(path)
    if not content:
        raise UsageError(f"{path}: the text is empty; give at least one token")
    return content
