"""Tasks of lm_eval on one or two packed models: names in, scores beside bytes and speed out.

Tasks and their data are loaded before a model is, so that a name or a data set that is missing is said at once. Seeds
and what `--num-fewshot` changes are lm_eval's own, so that scores can stand beside those of its command line. lm_eval
is imported when tasks are asked for; it knows how questions are put and counted, `harness` how the model answers.
"""

from __future__ import annotations

import difflib
import os
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeflow import pipeline
from moeflow.artifact.reader import Artifact
from moeflow.errors import MoeflowError, StorageError, UsageError
from moeflow.evaluation.run import check_context, check_reference, heading, sizes
from moeflow.evaluation.scores import read_scores
from moeflow.schema import TaskEvaluation, TaskProtocol, TasksDone
from moeflow.text import TextCodec

__all__ = ["Asked", "evaluate_tasks"]

Report = Callable[[str, int, int], None]
"""Told what runs, how many requests are done, and of how many."""


@dataclass(frozen=True)
class Asked:
    """Which tasks, and how."""

    names: Sequence[str]
    """Of tasks, groups or tags."""
    limit: int | None = None
    """Questions of each task."""
    shots: int | None = None
    """Examples before each question; None leaves it to the task."""
    files: Path | None = None
    """A directory with tasks of one's own."""
    chat: bool = False
    """Put questions through the model's chat template."""
    context: int | None = None
    """Tokens of a request, at most; None takes the artifact's plan."""


def evaluate_tasks(
    artifact: str | Path,
    asked: Asked,
    reference: str | Path | None = None,
    report: Report = lambda _what, _done, _total: None,
) -> TaskEvaluation:
    """Run tasks on a packed model.

    Args:
        artifact: its directory.
        asked: the tasks.
        reference: directory of the same model, unquantized; its scores stand beside.
        report: told of progress.

    Returns:
        A document with the model's row, and after it the reference's.

    Raises:
        UsageError: lm_eval is not installed, it knows no such task, or settings do not fit the model.
        StorageError: a task's data set is neither here nor to be had.
    """
    if find_spec("lm_eval") is None:
        raise UsageError('tasks are run by the library `lm_eval`, which is not installed: pip install "moeflow[tasks]"')
    opened = [Artifact.open(artifact)]
    if reference is not None:
        opened.append(Artifact.open(reference))
        model = opened[0].manifest.model
        check_reference(model.source, model.source_digest, opened[1])
    if asked.context is not None:
        check_context(asked.context, opened[0].manifest.model.max_context)
    if asked.chat and not TextCodec(opened[0].directory).tokenizer.chat_template:
        raise UsageError(f"{opened[0].directory}: the model has no chat template; leave out --chat")
    loaded = _load(_manager(asked), asked.names)
    rows, context = [], 0
    for one in opened:
        row, context = _row(one, loaded, asked, report)
        rows.append(row)
    protocol = TaskProtocol(
        names=tuple(asked.names),
        harness=version("lm_eval"),
        limit=asked.limit,
        shots=asked.shots,
        chat=asked.chat,
        context=context,
    )
    return TaskEvaluation(**heading(opened[0].manifest), tasks=protocol, rows=tuple(rows))


def _manager(asked: Asked) -> Any:
    """lm_eval's index of tasks, in which all names are."""
    from lm_eval.tasks import TaskManager

    if asked.files is not None:
        if not asked.files.is_dir():
            raise StorageError(f"{asked.files}: no such directory; --task-files takes one with tasks in YAML")
        own = TaskManager(include_path=str(asked.files), include_defaults=False)
        if set(asked.names) <= set(own.all_subtasks):  # reading lm_eval's 14,000 takes seconds
            return own
    manager = TaskManager(include_path=str(asked.files) if asked.files else None)
    for name in asked.names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            said = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise UsageError(f"lm_eval knows no task {name!r}; {said}")
    return manager


def _load(manager: Any, names: Sequence[str]) -> Any:
    """The tasks with their data, under lm_eval's seeds: some draw while they load."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of lm_eval, datasets and their clients: dozens of kinds, few of them documented
        raise _refused(error, names) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "asks about pictures"
            raise UsageError(f"task {name} {what}, which `moeflow eval` does not do; leave it out")
    return loaded


def _refused(error: Exception, names: Sequence[str]) -> MoeflowError:
    reason = str(error).partition("\n")[0].removesuffix(".") or type(error).__name__
    if isinstance(error, ImportError):
        return UsageError(f"{', '.join(names)}: a task needs a package that is not installed: {reason}")
    # lm_eval's errors do not name the task, and not always its data; the frame that asked for the data knows both
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    task = next((one for one in reversed(frames) if getattr(one, "DATASET_PATH", None)), None)
    if task is None:
        return UsageError(f"{', '.join(names)}: lm_eval cannot load this: {reason}")
    import datasets.config

    data = " ".join(str(part) for part in (task.DATASET_PATH, task.DATASET_NAME) if part)
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return StorageError(
        f"task {task.config.task}: its data set {data} cannot be loaded: {reason}; it was looked for in "
        f"{datasets.config.HF_DATASETS_CACHE} and at {hub}: run this once where there is a network, and copy that "
        "directory or point HF_DATASETS_CACHE to it"
    )


def _row(artifact: Artifact, loaded: Any, asked: Asked, report: Report) -> tuple[TasksDone, int]:
    """One model's scores, and for how long a context it was loaded."""
    from lm_eval import evaluator

    from moeflow.evaluation.harness import MoeflowLM

    _set_shots(loaded, asked.shots)
    label = str(artifact.manifest.quantization)
    with pipeline.load(artifact.directory, context_length=asked.context) as engine:
        model = MoeflowLM(engine, report=lambda what, done, total: report(f"{label}, {what}", done, total))
        found = evaluator.evaluate(
            model,
            loaded,
            limit=asked.limit,
            log_samples=False,
            apply_chat_template=asked.chat,
            fewshot_as_multiturn=asked.chat,
        )
        device, dtype = engine.plan.device, engine.plan.dtype
    tally = model.scorer.tally
    row = TasksDone(
        **sizes(artifact.manifest),
        device=device,
        dtype=dtype,
        requests=tally.requests,
        truncated=tally.truncated,
        tokens=tally.tokens,
        computed=tally.computed,
        seconds=tally.seconds,
        scores=read_scores(found),
    )
    return row, model.max_length


def _set_shots(loaded: Any, shots: int | None) -> None:
    """As lm_eval's `simple_evaluate` sets it: a task that says 0 keeps it, one that says nothing has none."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if (shots is not None and own != 0) or own is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
