"""Scores of tasks as text: tasks down, packings across, and below what each packing weighs and how fast it ran."""

from __future__ import annotations

import json
from collections.abc import Callable

from moeflow.reporting.cells import MISSING, Grid, digits, fill, hardware, listed, versions
from moeflow.reporting.text import aligned, piped
from moeflow.schema import TaskEvaluation, TaskScore, TasksDone
from moeflow.schema.units import format_size

__all__ = ["json_line", "markdown", "table"]

WIDTH = 120
BETTER = {True: "higher", False: "lower", None: MISSING}


def table(run: TaskEvaluation) -> str:
    """For a terminal; ends with a newline."""
    lines = [*fill(f"{run.model}: {_about(run)}", WIDTH), *fill(f"{hardware(run.environment)}; {versions(run)}", WIDTH)]
    lines += [f"{run.date}  {run.command}"]
    for grid in (_scores(run, " "), _packings(run)):
        lines += ["", *aligned(grid)]
    return "\n".join([*lines, "", *fill(_remark(run), WIDTH)]) + "\n"


def markdown(run: TaskEvaluation) -> str:
    """A section: heading, command, tasks and machine, tables; ends with a newline."""
    lines = [f"## {run.model} on {', '.join(run.tasks.names)}, {run.date[:10]}", "", f"`{run.command}`", ""]
    lines += fill(f"{_about(run)}. {hardware(run.environment)}; {versions(run)}.", WIDTH)
    for grid in (_scores(run, "\u2003"), _packings(run)):  # a renderer of Markdown drops ordinary spaces
        lines += ["", *piped(grid)]
    return "\n".join([*lines, "", *fill(f"{_remark(run)}.", WIDTH)]) + "\n"


def json_line(run: TaskEvaluation) -> str:
    """The document on one line, with what follows from its rows under `derived`; without that key it parses back."""
    derived = [
        {"expert_bits": row.expert_bits, "bits": row.bits, "tokens_per_second": row.tokens_per_second}
        for row in run.rows
    ]
    return json.dumps({**run.to_dict(), "derived": derived}, ensure_ascii=False)


def _about(run: TaskEvaluation) -> str:
    asked = run.tasks
    parts = [
        f"{', '.join(asked.names)} by lm_eval {asked.harness}",
        f"the first {asked.limit:,} questions of each task" if asked.limit else "all questions",
        "the tasks' own number of examples" if asked.shots is None else f"examples before each: {asked.shots}",
        f"contexts of at most {asked.context:,} tokens",
    ]
    return listed([*parts, "through the chat template"] if asked.chat else parts)


def _remark(run: TaskEvaluation) -> str:
    said = (
        "±: standard error; sizes count scales, zeros and padding; what requests share is computed once; tokens/s of "
        "the passes, prompts and answers together"
    )
    if cut := max(row.truncated for row in run.rows):
        said = f"{cut:,} requests did not fit the context and lost their beginning: see --context; {said}"
    return said


def _scores(run: TaskEvaluation, space: str) -> Grid:
    """One line for each metric; the task's name stands at its first."""
    columns = [row.quantization for row in run.rows]
    lines, before = [], None
    for place, score in enumerate(run.rows[0].scores):
        name, before = score.task if score.task != before else "", score.task
        shots = MISSING if score.shots is None else str(score.shots)
        metric = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
        cells = [_value(row.scores[place]) for row in run.rows]
        lines.append(
            (f"{2 * score.depth * space}{name}", metric, BETTER[score.higher_is_better], *cells,
             f"{score.samples:,}", shots)
        )  # fmt: skip
    return Grid("task", ("task", "metric", "better", *columns, "questions", "examples"), tuple(lines), 3)


def _value(score: TaskScore) -> str:
    if score.value is None:
        return MISSING
    return f"{score.value:.4g}" + (f" ± {score.stderr:.2g}" if score.stderr is not None else "")


def _packings(run: TaskEvaluation) -> Grid:
    figures: dict[str, Callable[[TasksDone], str]] = {
        "experts": lambda row: format_size(row.expert_nbytes),
        "bits a weight": lambda row: f"{row.expert_bits:.2f}",
        "all weights": lambda row: format_size(row.nbytes),
        "requests": lambda row: f"{row.requests:,}",
        "tokens": lambda row: f"{row.tokens:,}",
        "computed": lambda row: f"{row.computed:,}",
        "tokens/s": lambda row: digits(row.tokens_per_second) or MISSING,
        "on": lambda row: f"{row.device}, {row.dtype}",
    }
    lines = tuple((row.quantization, *(text(row) for text in figures.values())) for row in run.rows)
    return Grid("quantization", ("quantization", *figures), lines, 1)
