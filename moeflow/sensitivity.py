"""What each width costs each expert, measured: every expert is read once and quantized under every scheme.

Errors are those of packing: the same quantizer, packed and restored, so that what is measured here is what
an artifact has. One matrix is in memory at a time, with what is read ahead of it. It measures errors of weights, not of
what the model says: which of them matter more is left to whoever weighs them, or to `moeflow.output_errors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layers import MoeLayer
from moeflow.artifact.layout import expert_layout
from moeflow.artifact.overlap import Task, read_ahead
from moeflow.artifact.shards import encode_source
from moeflow.artifact.sources import Source, expert_sources
from moeflow.progress import Progress, silent
from moeflow.quantization.registry import quantizer_for
from moeflow.schema import BlobLayout, LayerErrors, Scheme, Sensitivity

__all__ = ["expert_tasks", "layouts_of", "measure"]


def measure(checkpoint: Checkpoint, model: str, schemes: Sequence[Scheme], progress: Progress = silent) -> Sensitivity:
    """The errors of every expert under every scheme; on the GPU where there is one.

    Args:
        checkpoint: with its weights.
        model: its name, for people.
        schemes: all different.
        progress: told of bytes of experts as they are read.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
        DocumentError: a scheme's groups do not fit the model's dimensions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layouts = [layouts_of(checkpoint, layer, schemes) for layer in checkpoint.layers]
    done, total = 0, sum(task.nbytes for task in expert_tasks(checkpoint, layouts, device))
    found = []
    with read_ahead(expert_tasks(checkpoint, layouts, device)) as sources:
        for number, (layer, own) in enumerate(zip(checkpoint.layers, layouts, strict=True), start=1):
            squares, errors = [], []
            for _ in layer.experts:
                progress(f"quantizing layer {number} of {len(layouts)}", done, total)
                square, row, nbytes = _expert(checkpoint, own, sources, device)
                squares.append(square)
                errors.append(row)
                done += nbytes
            found.append(LayerErrors(layer=layer.index, squares=tuple(squares), errors=tuple(errors)))
    progress("quantizing", total, total)
    return Sensitivity(model=model, source_digest=checkpoint.digest(), schemes=tuple(schemes), layers=tuple(found))


def layouts_of(checkpoint: Checkpoint, layer: MoeLayer, schemes: Sequence[Scheme]) -> list[BlobLayout]:
    """Of an expert of the layer, per scheme; their matrices are the same in all but how they are stored."""
    family, dtype = checkpoint.family, checkpoint.dtype
    return [expert_layout(layer.hidden, layer.intermediate, scheme, dtype, family.biased) for scheme in schemes]


def expert_tasks(
    checkpoint: Checkpoint, layouts: Sequence[Sequence[BlobLayout]], device: torch.device
) -> Iterator[Task[Source]]:
    """Every matrix of every expert, in order."""
    for layer, own in zip(checkpoint.layers, layouts, strict=True):
        yield from expert_sources(checkpoint, layer, [own[0]] * len(layer.experts), device)


def _expert(
    checkpoint: Checkpoint, layouts: Sequence[BlobLayout], sources: Iterator[Source], device: torch.device
) -> tuple[float, tuple[float, ...], int]:
    """The squares of the next expert's weights, its errors per scheme, and the bytes that were read."""
    square, nbytes, errors = 0.0, 0, [0.0] * len(layouts)
    blob = torch.zeros(max(layout.nbytes for layout in layouts), dtype=torch.uint8, device=device)
    for matrices in zip(*(layout.matrices for layout in layouts), strict=True):
        source = next(sources)
        nbytes += sum(tensor.nbytes for _, tensor in source)
        own = 0.0
        for number, matrix in enumerate(matrices):
            error, own = encode_source(checkpoint, matrix, source, quantizer_for(matrix.scheme), blob)
            errors[number] += error
        square += own  # the same under every scheme
    return square, tuple(errors), nbytes
