"""`moeflow allocate`: bits for every expert of a model under a budget, as a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moeflow.errors import UsageError, unknown
from moeflow.schema.auto import TOKENS

__all__ = ["allocate"]


def allocate(
    model: Annotated[str, typer.Argument(help="Hub id, checkpoint directory, or demo.", show_default=False)],
    budget: Annotated[
        float, typer.Option(min=0.0, help="Bits a weight over all experts, with scales, zeros and padding.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Profile to write.")] = Path("profile.yaml"),
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file: errors are of what experts add to its tokens, not of weights.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="How many of the text's first tokens.")] = TOKENS,
    trace: Annotated[
        Path | None, typer.Option(help="Recorded routes: errors of weights count by how often an expert is used.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="JSON of measured errors: read where it is there, else written.")
    ] = None,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="All experts of a layer alike: the model can run device-driven.")
    ] = False,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="2, 3, 4, 8 (groups of 64) or 2g16 (8-bit scales); repeatable; default: 2, 3, 4."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Choose bits for every expert from measured errors under a budget, and write a profile that `pack` takes.

    Every expert is read once and quantized under every scheme; with --table the errors are kept for other budgets.
    """
    from moeflow import pipeline
    from moeflow.console import progress_bar, say
    from moeflow.console_allocate import show_allotment
    from moeflow.files import write_text
    from moeflow.planning.blobs import SCHEMES
    from moeflow.planning.reasons import annotated
    from moeflow.schema import Profile

    names = list(dict.fromkeys(scheme or ("2", "3", "4")))
    for name in names:
        if name not in SCHEMES:
            raise UsageError(unknown("scheme", name, SCHEMES))
    schemes = [SCHEMES[name] for name in names]
    measured: dict[str, Any] = {"text": text, "tokens": tokens, "trace": trace, "table": table}
    with progress_bar() as progress:
        found = pipeline.allocate(model, budget, schemes=schemes, **measured, by_layer=by_layer, progress=progress)
    profile, why = Profile(model=model, quantization=found.quantization), found.reasons()
    write_text(output, annotated(pipeline.seen_from(output.parent, profile), why))
    if as_json:
        return typer.echo(json.dumps({"profile": profile.to_dict(), "reasons": why, **found.to_dict()}))
    show_allotment(found)
    say(f"wrote {output}, with the reason; next: moeflow pack {output}")
    return None
