"""Bits for a model's experts, from what is asked to what is chosen: measure, weigh, allot.

The same for `moeflow allocate` and for `bits: auto` in a profile. What was measured is kept as a table, in a file that
the user names or in the artifact's own notes, so that nothing is measured a second time, and what was interrupted ends
as it would have. The choice itself is a pure function of the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeflow import __version__
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.errors import UsageError
from moeflow.files import read_text
from moeflow.offload.trace import load_trace
from moeflow.planning.bits import Allotment, allot, even, importance, layers_alike
from moeflow.planning.blobs import Blobs
from moeflow.planning.standin import schemes_of
from moeflow.progress import Progress, silent
from moeflow.schema import AutoBits, BitChoice, MeasuredText, Scheme, Sensitivity
from moeflow.schema.auto import TOKENS
from moeflow.text import TextCodec

__all__ = ["Request", "choose", "measured_for", "without_paths", "of_profile", "record"]


@dataclass(frozen=True)
class Request:
    """What is to be chosen, and by what."""

    budget: float
    """Bits a weight over all experts, with scales, zeros and padding."""
    schemes: tuple[Scheme, ...]
    by_layer: bool = False
    text: Path | None = None
    """Errors of outputs on its beginning; without, of weights."""
    trace: Path | None = None
    """Weighs errors of weights."""
    tokens: int = TOKENS
    """Of the text's beginning."""


def of_profile(asked: AutoBits) -> Request:
    """What `bits: auto` asks."""
    text, trace = (Path(path) if path is not None else None for path in (asked.text, asked.trace))
    return Request(asked.budget, schemes_of(asked), asked.units == "layers", text, trace, asked.tokens)


def choose(
    checkpoint: Checkpoint, model: str, request: Request, table: Path | None, progress: Progress = silent
) -> tuple[Allotment, Sensitivity]:
    """The choice, and the errors that it was made by.

    Args:
        checkpoint: with its weights, unless `table` has their errors.
        model: its name, for people.
        request: what is to be chosen.
        table: JSON of measured errors; what it lacks is measured and added.
        progress: told of bytes as they are quantized.

    Raises:
        UsageError: the budget is below the smallest scheme or above the largest, or text and trace are both given.
        DocumentError: trace or table are of another model, or no scheme fits its dimensions.
    """
    blobs = Blobs.of(checkpoint, request.schemes)
    blobs.budget(request.budget)  # what cannot be met is refused before every expert is quantized
    weights, tokens = even(blobs), 0
    if request.trace is not None:
        if request.text is not None:
            raise UsageError("a text and a trace are given; outputs on a text count uses already: leave out the trace")
        routes = load_trace(request.trace)
        routes.require(len(blobs.layers), blobs.experts, checkpoint.top_k, str(request.trace))
        weights, tokens = importance(routes), len(routes.routes)
    errors = _sensitivity(checkpoint, model, blobs.schemes, request, table, progress)
    if request.text is not None:
        weights = layers_alike(errors)
    return allot(blobs, errors, request.budget, weights, tokens, request.by_layer), errors


def _sensitivity(
    checkpoint: Checkpoint,
    model: str,
    schemes: Sequence[Scheme],
    request: Request,
    table: Path | None,
    progress: Progress,
) -> Sensitivity:
    """The errors under these schemes: what the file has of them, the rest measured and, with a file, added to it."""
    ids, about = _read(checkpoint, request.text, request.tokens) if request.text is not None else ([], None)
    known = Sensitivity.load(table) if table is not None and table.is_file() else None
    if known is not None:
        known.require(checkpoint.digest(), about, str(table))
    if missing := known.missing(schemes) if known is not None else tuple(schemes):
        found = _measured(checkpoint, model, missing, ids, about, progress)
        known = known.joined(found) if known is not None else found
        if table is not None:
            known.save(table)
    assert known is not None, "nothing is missing only where something is known"
    return known.of(schemes)


def _measured(
    checkpoint: Checkpoint,
    model: str,
    schemes: Sequence[Scheme],
    ids: Sequence[int],
    about: MeasuredText | None,
    progress: Progress,
) -> Sensitivity:
    if about is None:
        from moeflow.sensitivity import measure

        return measure(checkpoint, model, schemes, progress)
    from moeflow.output_errors import measure_outputs

    return measure_outputs(checkpoint, model, schemes, ids, about, progress)


def _read(checkpoint: Checkpoint, path: Path, tokens: int) -> tuple[list[int], MeasuredText]:
    """The token ids of a text's beginning.

    Raises:
        UsageError: it has none.
        StorageError: it cannot be read.
        DocumentError: it is not UTF-8.
    """
    ids = TextCodec(checkpoint.directory).encode(read_text(path))[:tokens]
    if not ids:
        raise UsageError(f"{path}: the text is empty; give some thousand words of what the model is to write")
    digest = hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
    return ids, MeasuredText(name=path.name, digest=digest, tokens=len(ids))


def measured_for(
    checkpoint: Checkpoint, model: str, request: Request, notes: Path, progress: Progress = silent
) -> tuple[Allotment, Sensitivity]:
    """`choose` by a table among an artifact's notes, which counts for the same stored weights, text and code.

    A checkpoint's digest would take one fine-tuning for another: notes are of this machine, and know the files.
    """
    names = [name for layer in checkpoint.layers for name in layer.tensors]
    text = None if request.text is None else read_text(request.text)
    facts = [checkpoint.fingerprint(names), text, request.tokens, __version__]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return choose(checkpoint, model, request, notes / f"sensitivity-{key[:16]}.json", progress)


def without_paths(asked: AutoBits) -> AutoBits:
    """The same with files by name alone: whose directories they lie in is nobody's business."""
    names = {key: Path(path).name for key in ("text", "trace") if (path := getattr(asked, key)) is not None}
    return asked.model_copy(update=names)


def record(asked: AutoBits, found: Allotment, table: Sensitivity) -> BitChoice:
    """What was chosen and why, without anybody's directories."""
    return BitChoice(
        asked=without_paths(asked),
        measured=found.measured,
        table=table,
        sizes=tuple(map(tuple, found.blobs.sizes.tolist())),
        choices=tuple(map(tuple, found.choices.tolist())),
        nbytes=found.nbytes,
        achieved=found.bits,
        error=found.error,
        bound=found.bound,
        reason=found.reasons()["quantization"],
    )
