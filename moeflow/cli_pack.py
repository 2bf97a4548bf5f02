"""`moeflow pack`: a profile's model packed, or with `--dry-run` what that would make and take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["pack"]


def pack(
    profile: Annotated[Path, typer.Argument(help="Profile YAML.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: artifacts/PROFILE.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an artifact made from other settings.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, memory and time, and write nothing; needs no weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Quantize and pack a profile's model, and plan for its hardware. Interrupted, it goes on where it stopped."""
    from moeflow import pipeline
    from moeflow.console import out, progress_bar, say, show_forecast

    if dry_run:
        found = pipeline.dry_run(profile, output)
        return typer.echo(json.dumps(found.to_dict())) if as_json else show_forecast(found, to=out)
    with progress_bar() as progress:
        directory = pipeline.pack(profile, output, overwrite=overwrite, progress=progress)
    if as_json:
        return typer.echo(json.dumps({"artifact": str(directory)}))
    say(f'packed; next: moeflow generate {directory} -p "..."')
    return typer.echo(str(directory))
