"""One evaluation: a text and one or two artifacts in, rows of a document out.

The reference runs first and its logits wait on disk (`kept`); its own row costs nothing more and stands beside the
other's. Knows no command line; loading is the pipeline's.
"""

from __future__ import annotations

import hashlib
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from moeflow import pipeline
from moeflow.artifact.reader import Artifact
from moeflow.errors import UsageError
from moeflow.evaluation.kept import KeptLogits
from moeflow.evaluation.quality import divergence, perplexity
from moeflow.evaluation.windows import check, scored
from moeflow.probe.environment import environment
from moeflow.schema import DenseScheme, Divergence, Evaluated, Evaluation, Manifest, TextProtocol
from moeflow.text import TextCodec

__all__ = ["Reference", "Text", "check_context", "check_reference", "evaluate", "heading", "protocol", "sizes"]

CONTEXT, STRIDE = 2048, 512

Report = Callable[[str, int, int], None]
"""Told what runs, how many tokens are counted, and of how many."""


@dataclass(frozen=True)
class Text:
    """What is read, and how much of it; what is None is chosen for the model."""

    name: str
    content: str
    context: int | None = None
    stride: int | None = None
    tokens: int | None = None
    """Of the text's beginning."""


def protocol(directory: Path, most: int, text: Text) -> tuple[list[int], TextProtocol]:
    """The text's token ids, and how they are cut.

    Args:
        directory: where the model's tokenizer is.
        most: positions that the model was made for.
        text: what to read, and how.

    Raises:
        UsageError: the text is too short, or its context or stride do not fit the model or each other.
    """
    context = min(CONTEXT, most) if text.context is None else text.context
    stride = min(STRIDE, context) if text.stride is None else text.stride
    check_context(context, most)
    ids = TextCodec(directory).encode(text.content)[: text.tokens]
    check(len(ids), context, stride)
    return ids, TextProtocol(
        text=text.name,
        digest=hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest(),
        tokens=len(ids),
        scored=scored(len(ids), context, stride),
        context=context,
        stride=stride,
    )


def check_context(context: int, most: int) -> None:
    """Refuses a context of more tokens than the model was made for."""
    if context > most:
        raise UsageError(f"context is {context}; the model was made for no more than {most}")


def check_reference(source: str, digest: str, reference: Artifact) -> None:
    """Whether `reference` is the model `source` of that digest, unquantized.

    Raises:
        UsageError: it is not.
    """
    other = reference.manifest
    if digest != other.model.source_digest:
        raise UsageError(
            f"{reference.directory}: packed from another model ({other.model.source}) than {source}; "
            "pack the same checkpoint with backend none"
        )
    if not _unquantized(other):
        raise UsageError(
            f"{reference.directory}: is quantized ({other.quantization}); the reference is the same checkpoint "
            "packed with backend none for experts and attention"
        )


def _unquantized(manifest: Manifest) -> bool:
    matrices = [matrix for layout in manifest.layouts for matrix in layout.matrices]
    return all(isinstance(matrix.scheme, DenseScheme) for matrix in (*matrices, *manifest.resident))


class Reference:
    """An unquantized model whose run of one text serves every model that is compared with it. A context manager."""

    def __init__(self, directory: str | Path):
        self.artifact = Artifact.open(directory)
        self._kept: KeptLogits | None = None
        self._cut: TextProtocol | None = None
        self._row: Evaluated | None = None

    def run(self, ids: Sequence[int], cut: TextProtocol, report: Report) -> tuple[Evaluated, KeptLogits]:
        """Its row, and its logits from the first one on; computed where `cut` is not what it was the last time."""
        if self._kept is None or self._row is None or self._cut != cut:
            self.close()
            self._kept = KeptLogits(cut.scored)
            self._row = _row(self.artifact, ids, cut, report, self._kept.write)
            self._cut = cut
        self._kept.rewind()
        return self._row, self._kept

    def close(self) -> None:
        """Give back the logits' file."""
        if self._kept is not None:
            self._kept.close()
        self._kept = self._row = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluate(
    artifact: str | Path,
    text: Text,
    reference: str | Path | Reference | None = None,
    report: Report = lambda _what, _done, _total: None,
) -> Evaluation:
    """Evaluate a packed model on a text.

    Args:
        artifact: its directory.
        text: what to predict.
        reference: the same model, unquantized, or its directory; for divergence.
        report: told of progress.

    Returns:
        A document with the model's row, and after it the reference's.

    Raises:
        UsageError: text, settings or reference do not fit the model.
        CapacityError: the reference's logits do not fit the disk.
    """
    if isinstance(reference, str | Path):
        with Reference(reference) as once:
            return evaluate(artifact, text, once, report)
    opened = Artifact.open(artifact)
    if reference is not None:
        check_reference(opened.manifest.model.source, opened.manifest.model.source_digest, reference.artifact)
    ids, cut = protocol(opened.directory, opened.manifest.model.max_context, text)
    rows = [_row(opened, ids, cut, report)] if reference is None else _compared(opened, reference, ids, cut, report)
    return Evaluation(**heading(opened.manifest), protocol=cut, rows=tuple(rows))


def heading(manifest: Manifest) -> dict[str, Any]:
    """What every evaluation of a model begins with: this command, now, here."""
    return {
        "command": shlex.join(["moeflow", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment(),
        "model": manifest.model.source,
        "source_digest": manifest.model.source_digest,
    }


def sizes(manifest: Manifest) -> dict[str, Any]:
    """What every row says of its packing."""
    return {
        "experts": manifest.quantization.experts.label,
        "attention": manifest.quantization.attention.label,
        "quantization": str(manifest.quantization),
        "expert_nbytes": manifest.expert_nbytes,
        "expert_parameters": manifest.model.expert_parameters,
        "nbytes": sum(shard.nbytes for shard in manifest.shards),
        "parameters": manifest.model.parameters,
    }


def _compared(
    opened: Artifact, reference: Reference, ids: Sequence[int], cut: TextProtocol, report: Report
) -> list[Evaluated]:
    """The model's row, with its divergence, and the reference's."""
    parts: list[Divergence] = []
    theirs, kept = reference.run(ids, cut, report)
    own = _row(opened, ids, cut, report, lambda rows: parts.append(divergence(kept.read(len(rows)), rows)))
    whole = Divergence(kl=math.fsum(part.kl for part in parts), agreed=sum(part.agreed for part in parts))
    return [own.model_copy(update={"divergence": whole}), theirs]


def _row(
    artifact: Artifact,
    ids: Sequence[int],
    cut: TextProtocol,
    report: Report,
    take: Callable[[Tensor], None] = lambda _: None,
) -> Evaluated:
    manifest = artifact.manifest
    label = str(manifest.quantization)
    with pipeline.load(artifact.directory, context_length=cut.context) as engine:
        found = perplexity(engine, ids, cut.context, cut.stride, take, lambda done, total: report(label, done, total))
        device, dtype = engine.plan.device, engine.plan.dtype
    return Evaluated(
        **sizes(manifest),
        device=device,
        dtype=dtype,
        nll=found.nll,
        computed=found.computed,
        seconds=found.seconds,
    )
