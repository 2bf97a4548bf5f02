"""A grid of bits, attention by experts: each combination is packed and evaluated once, in a directory that resumes.

Under the directory lie `EXPERTS-ATTENTION/`, an artifact, and `EXPERTS-ATTENTION.json`, its evaluation, written last
and atomically. A run that finds an evaluation of the same checkpoint, bits, text and protocol takes it as it is,
whether its artifact still exists or not; one that finds an artifact does not pack again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from moeflow import pipeline
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.hub import resolve_model
from moeflow.errors import UsageError
from moeflow.evaluation.run import Reference, Report, Text, check_reference, evaluate, protocol
from moeflow.files import storage_errors
from moeflow.progress import Progress, silent
from moeflow.schema import Evaluation, HardwareProfile, Profile, TextProtocol
from moeflow.schema.quantization import scheme_settings

__all__ = ["Cell", "cells", "merged", "run_grid"]

SCHEME = re.compile(r"(?P<bits>\d+)(g(?P<group>\d+))?(m(?P<meta>\d+))?")


@dataclass(frozen=True)
class Cell:
    """One combination."""

    name: str
    """Of its files: `2g16m8-4`, experts first."""
    profile: Profile


def cells(model: str, experts: str, attention: str) -> list[Cell]:
    """Every combination, attention by attention.

    Args:
        model: as in a profile.
        experts: bits with commas between; a group size and the bits of scales and zeros may follow: `2g16m8,3,4,16`.
        attention: the same of the attention.

    Raises:
        UsageError: a scheme is not written so.
        DocumentError: there is no such scheme.
    """
    found = []
    for down, across in product(_schemes(attention), _schemes(experts)):
        schemes = {"experts": _settings(across), "attention": _settings(down)}
        profile = Profile.parse({"model": model, "quantization": schemes}, "grid")
        found.append(Cell(f"{across}-{down}", profile))
    return found


def _schemes(written: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in written.split(",")))


def _settings(written: str) -> dict[str, object]:
    match = SCHEME.fullmatch(written)
    if match is None:
        raise UsageError(
            f"{written!r} is no scheme; write bits, then a group size after g and the bits of scales after m if they "
            "are not 64 and 16: 2g16m8,3,4,16"
        )
    return scheme_settings(int(match["bits"]), int(match["group"] or 64), int(match["meta"] or 16))


def run_grid(
    wanted: Sequence[Cell],
    text: Text,
    directory: Path,
    hardware: HardwareProfile | None = None,
    reference: Path | None = None,
    keep: bool = True,
    progress: Progress = silent,
    report: Report = lambda _what, _done, _total: None,
) -> Iterator[tuple[Cell, Evaluation, bool]]:
    """Evaluate cells of one model; yields each with its evaluation, and whether that was found finished.

    Args:
        wanted: from `cells`.
        text: what to predict.
        directory: where artifacts and evaluations lie.
        hardware: the machine; by default this one, probed once if anything is packed.
        reference: the same model's directory, unquantized; for divergence. It runs once.
        keep: leave artifacts where they are; else each is removed once it is evaluated.
        progress: told of packing.
        report: told of evaluating.
    """
    checkpoint = Checkpoint.open(resolve_model(wanted[0].profile.model, wanted[0].profile.revision))
    digest = checkpoint.digest()
    _, cut = protocol(checkpoint.directory, checkpoint.max_context, text)
    with nullcontext() if reference is None else Reference(reference) as other:
        if other is not None:
            check_reference(wanted[0].profile.model, digest, other.artifact)
        for cell in wanted:
            record, artifact = directory / f"{cell.name}.json", directory / cell.name
            found = _finished(record, cell, digest, cut, other is not None)
            fresh = found is None
            if found is None:
                hardware = hardware or pipeline.resolve_hardware("auto")
                pipeline.pack(cell.profile, artifact, hardware=hardware, progress=progress)
                found = evaluate(artifact, text, other, report)
                found.save(record)
                if not keep:
                    with storage_errors(artifact, "remove"):
                        shutil.rmtree(artifact)
            yield cell, found, not fresh


def _finished(record: Path, cell: Cell, digest: str, cut: TextProtocol, compared: bool) -> Evaluation | None:
    """The evaluation of an earlier run, if it is what would be made now."""
    if not record.is_file():
        return None
    found = Evaluation.load(record)
    row = found.rows[0]
    same = (found.source_digest, found.protocol, row.quantization) == (digest, cut, str(cell.profile.quantization))
    return found if same and (row.divergence is not None or not compared) else None


def merged(found: Sequence[Evaluation], command: str) -> Evaluation:
    """One document of all cells, in their order, under the newest one's date and the command of the grid."""
    newest = max(found, key=lambda one: one.date)
    return newest.model_copy(update={"command": command, "rows": tuple(one.rows[0] for one in found)})
