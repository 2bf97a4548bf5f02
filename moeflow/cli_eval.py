"""`moeflow eval` and `eval-grid`: how well packed models predict a text or do tasks, beside their bytes and speed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeflow.errors import UsageError

if TYPE_CHECKING:
    from moeflow.evaluation.run import Text
    from moeflow.schema import Document, Evaluation, TaskEvaluation

__all__ = ["evaluate", "evaluate_grid"]

File = Annotated[Path | None, typer.Option(help="A text file, UTF-8.")]
Dataset = Annotated[
    str | None, typer.Option(help="wikitext-2, c4 or ptb, through the library `datasets`; in place of --text.")
]
Reference = Annotated[
    Path | None,
    typer.Option(help="The same model packed with backend none: adds KL divergence and agreement, or its scores."),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens of a window; default: 2048, or the model's own if less. Of a request: the artifact's."
    ),
]
Stride = Annotated[
    int | None, typer.Option(min=1, help="Tokens between windows' starts; default: 512, or the context if less.")
]
Tokens = Annotated[int | None, typer.Option("--tokens", "-n", min=2, help="Of the text's beginning.")]
Markdown = Annotated[Path | None, typer.Option(help="Append a section in Markdown.")]
Plot = Annotated[Path | None, typer.Option(help="Write a picture (PNG): perplexity over size.")]
Tasks = Annotated[
    str | None, typer.Option(help="Tasks of lm_eval, with commas between, such as mmlu,arc_easy; in place of --text.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Of tasks: questions of each, at most.")]
Shots = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Of tasks: examples before each question; default: its own.")
]
TaskFiles = Annotated[Path | None, typer.Option(help="Of tasks: a directory with tasks of your own, in YAML.")]
Chat = Annotated[bool, typer.Option("--chat", help="Of tasks: put questions through the model's chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Directory that `moeflow pack` wrote.", show_default=False)],
    text: File = None,
    dataset: Dataset = None,
    tasks: Tasks = None,
    reference: Reference = None,
    context: Context = None,
    stride: Stride = None,
    tokens: Tokens = None,
    limit: Limit = None,
    num_fewshot: Shots = None,
    task_files: TaskFiles = None,
    chat: Chat = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result as JSON.")] = None,
    markdown: Markdown = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, divergence from the unquantized model, or scores of tasks, beside bytes and speed."""
    from moeflow.reporting import picture

    of_tasks = {"--limit": limit, "--num-fewshot": num_fewshot, "--task-files": task_files, "--chat": chat or None}
    if tasks is not None:
        texts = {"--text": text, "--dataset": dataset, "--stride": stride, "--tokens": tokens, "--plot": plot}
        _refuse(texts, "is for texts; --tasks goes without it")
        scored = _run_tasks(artifact, tasks, reference, context, limit, num_fewshot, task_files, chat)
        _show_tasks(scored, output, markdown, as_json)
        return
    _refuse(of_tasks, "is for tasks: name some with --tasks")
    if plot is not None:
        picture.check(plot)
    found = _run(artifact, _text(text, dataset, context, stride, tokens), reference)
    _show(found, output, markdown, plot, as_json)


def evaluate_grid(
    model: Annotated[str, typer.Argument(help="A checkpoint, as in a profile.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of artifacts and results.", show_default=False)
    ],
    experts: Annotated[
        str, typer.Option(help="Bits; group size and bits of scales follow after g and m if not 64 and 16.")
    ] = "2g16m8,3,4,16",
    attention: Annotated[str, typer.Option(help="The same of the attention.")] = "2g16m8,3,4,16",
    text: File = None,
    dataset: Dataset = None,
    reference: Reference = None,
    context: Context = None,
    stride: Stride = None,
    tokens: Tokens = None,
    keep: Annotated[bool, typer.Option(help="Keep each artifact once it is evaluated.")] = True,
    markdown: Markdown = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Pack and evaluate each combination of bits, as in the paper's table 1. Interrupted, it goes on."""
    from moeflow.console import err, say
    from moeflow.evaluation.grid import cells, merged, run_grid
    from moeflow.reporting import picture

    if plot is not None:
        picture.check(plot)
    wanted = cells(model, experts, attention)
    source = _text(text, dataset, context, stride, tokens)
    found = []
    with err.status("reading") as status:
        for cell, one, before in run_grid(
            wanted,
            source,
            output,
            reference=reference,
            keep=keep,
            progress=lambda what, done, total: status.update(f"packing, {what}: {done / max(1, total):.0%}"),
            report=lambda what, done, total: status.update(f"{what}: {done:,} of {total:,} tokens"),
        ):
            found.append(one)
            say(f"{cell.name}: perplexity {one.perplexity(one.rows[0]):.4g}{', from before' if before else ''}")
    _show(merged(found, shlex.join(["moeflow", *sys.argv[1:]])), output / "grid.json", markdown, plot, as_json)


def _text(path: Path | None, dataset: str | None, context: int | None, stride: int | None, tokens: int | None) -> Text:
    """What to read; read at once, before a model is loaded."""
    from moeflow.evaluation.run import Text
    from moeflow.evaluation.texts import dataset_text, file_text

    if (path is None) == (dataset is None):
        raise UsageError(
            "give --text with a file, or --dataset with wikitext-2, c4 or ptb: one of the two (or, to `eval`, --tasks)"
        )
    content = file_text(path) if path is not None else dataset_text(dataset or "")
    return Text(path.name if path is not None else dataset or "", content, context, stride, tokens)


def _run(artifact: Path, text: Text, reference: Path | None) -> Evaluation:
    from moeflow.console import err
    from moeflow.evaluation.run import evaluate

    with err.status("loading") as status:
        return evaluate(
            artifact, text, reference, lambda what, done, total: status.update(f"{what}: {done:,} of {total:,} tokens")
        )


def _refuse(given: dict[str, Any], why: str) -> None:
    if names := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"{names[0]} {why}")


def _run_tasks(
    artifact: Path, names: str, reference: Path | None, context: int | None, limit: int | None, shots: int | None,
    files: Path | None, chat: bool,
) -> TaskEvaluation:  # fmt: skip
    from moeflow.console import err
    from moeflow.evaluation.tasks import Asked, evaluate_tasks

    wanted = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not wanted:
        raise UsageError("--tasks names none; give some with commas between: mmlu,arc_easy")
    asked = Asked(wanted, limit, shots, files, chat, context)
    with err.status("reading tasks") as status:
        return evaluate_tasks(
            artifact, asked, reference, lambda what, done, total: status.update(f"{what}: {done:,} of {total:,}")
        )


def _show_tasks(found: TaskEvaluation, output: Path | None, markdown: Path | None, as_json: bool) -> None:
    from moeflow.reporting import tasks

    typer.echo(tasks.json_line(found) if as_json else tasks.table(found), nl=as_json)
    _write(found, output, tasks.markdown(found), markdown)


def _show(found: Evaluation, output: Path | None, markdown: Path | None, plot: Path | None, as_json: bool) -> None:
    """Print the result, and write what was asked for."""
    from moeflow.console import say
    from moeflow.reporting import quality

    typer.echo(quality.json_line(found) if as_json else quality.table(found), nl=as_json)
    _write(found, output, quality.markdown(found), markdown)
    if plot is not None:
        from moeflow.reporting.tradeoff import plot as draw

        draw(found, plot)
        say(f"wrote {plot}")


def _write(found: Document, output: Path | None, section: str, markdown: Path | None) -> None:
    from moeflow.files import storage_errors

    if output is not None:
        found.save(output)
    if markdown is not None:
        with storage_errors(markdown, "write"), markdown.open("a", encoding="utf-8") as stream:
            stream.write("\n" + section)
