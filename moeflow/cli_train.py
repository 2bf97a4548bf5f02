"""`moeflow train-predictor`: a text in, a predictor beside the artifact out, and how well it did on the text's end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeflow.errors import UsageError

if TYPE_CHECKING:
    from moeflow.schema import PredictorCard

__all__ = ["train_predictor"]


def train_predictor(
    artifact: Annotated[Path, typer.Argument(help="Directory that `moeflow pack` wrote.", show_default=False)],
    text: Annotated[
        Path, typer.Option(help="A text file (UTF-8), like what the model shall write.", show_default=False)
    ],
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", min=1, help="Only the first so many; default: the whole text.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="How many layers ahead can be guessed.")] = 2,
    reuse: Annotated[
        float, typer.Option(min=0, max=0.99, help="A use one token later counts so much less than the one before it.")
    ] = 0.7,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of the text, its end, that is judged on and not fitted to.")
    ] = 0.1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: predictor.safetensors in the artifact.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Plan anew for this machine: a name in hardware/, a path, or auto (probe).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Learn from a text which experts come next and which are used again soon. The file holds no text.

    Then: --policy learned and --predictor learned, or the same in a profile.
    """
    from moeflow import cli_load
    from moeflow.artifact.predictors import PREDICTOR, save_predictor
    from moeflow.console import err, say
    from moeflow.files import read_text
    from moeflow.learning import training
    from moeflow.recording import check_writable

    content, target = read_text(text), output or artifact / PREDICTOR
    check_writable(target)

    def report(description: str, done: int, total: int) -> None:
        status.update(f"{description}: {done:,} of {total:,}")

    changes = {
        "policy": "lru",
        "predictor": "none",
        "hardware": hardware,
    }  # a profile may ask for what is not there yet
    with cli_load.load(artifact, record_routes=True, **changes) as engine, err.status("reading") as status:
        try:
            card, matrices = training.train_predictor(engine, content, tokens, depth, reuse, held_out, report)
        except UsageError as error:
            raise UsageError(f"{text}: {error}") from error
    save_predictor(target, card, matrices)
    if as_json:
        return typer.echo(card.to_json(), nl=False)
    _show(card)
    say(f"wrote {target}; next: moeflow generate {artifact} --policy learned --predictor learned")
    return None


def _show(card: PredictorCard) -> None:
    from moeflow.reporting.predictor import render

    typer.echo(render(card), nl=False)
