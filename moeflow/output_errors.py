"""What each width costs each expert, measured where it counts: in what the expert adds to a text's hidden states.

One pass over the text, in which every expert is read once, quantized under every scheme, and run on the tokens that
the router sends it. An error is the sum, over these tokens, of the squares by which the expert's weighted output
changes: how often it is used, how much the router trusts it and what its inputs are like all count. The pass itself is
the unquantized model's: errors of one layer do not reach the next, and what later layers make of them is not seen.

Memory holds what is no expert, one expert under one scheme at a time, and the hidden states of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.matrix import dequantize, parts_of
from moeflow.artifact.overlap import read_ahead
from moeflow.artifact.shards import encode_source
from moeflow.artifact.sources import Source
from moeflow.artifact.unpacked import UnpackedArtifact
from moeflow.model.build import bare_model
from moeflow.model.experts import multiply
from moeflow.progress import Progress, silent
from moeflow.quantization.registry import quantizer_for
from moeflow.schema import BlobLayout, DenseScheme, LayerErrors, MeasuredText, Scheme, Sensitivity
from moeflow.sensitivity import expert_tasks, layouts_of

__all__ = ["WINDOW", "measure_outputs"]

WINDOW = 512
"""Tokens that are read together, each window as if nothing came before."""


def measure_outputs(
    checkpoint: Checkpoint,
    model: str,
    schemes: Sequence[Scheme],
    ids: Sequence[int],
    text: MeasuredText,
    progress: Progress = silent,
) -> Sensitivity:
    """The errors of every expert's outputs under every scheme; on the GPU where there is one.

    Args:
        checkpoint: with its weights.
        model: its name, for people.
        schemes: all different.
        ids: tokens of the text; what is left of the last window is not read, unless there is no other.
        text: what it was, for the table.
        progress: told of bytes of experts as they are read.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or is none of transformers' model.
        DocumentError: a scheme's groups do not fit the model's dimensions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length = min(len(ids), WINDOW, checkpoint.max_context)
    windows = torch.tensor(ids[: len(ids) // length * length], device=device).view(-1, length)  # [B, W]
    layouts = [layouts_of(checkpoint, layer, [DenseScheme(), *schemes]) for layer in checkpoint.layers]
    total = sum(task.nbytes for task in expert_tasks(checkpoint, layouts, device))
    with read_ahead(expert_tasks(checkpoint, layouts, device)) as sources:
        runner = _Runner(checkpoint, layouts, sources, total, device, progress)
        dtype = getattr(torch, checkpoint.dtype) if device.type == "cuda" else torch.float32
        built: Any = bare_model(UnpackedArtifact(checkpoint, model), dtype, runner, device)
        with torch.inference_mode():
            built.base_model(input_ids=windows, use_cache=False)
    progress("measuring", total, total)
    digest = checkpoint.digest()
    found = tuple(runner.found)
    return Sensitivity(model=model, source_digest=digest, schemes=tuple(schemes), layers=found, text=text)


class _Runner:
    """Computes experts as they are, and beside that what each scheme would change."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layouts: Sequence[Sequence[BlobLayout]],
        sources: Iterator[Source],
        total: int,
        device: torch.device,
        progress: Progress,
    ):
        """`layouts` have, per layer, the plain numbers' first and the schemes' after it; `sources` come in order."""
        self.found: list[LayerErrors] = []
        self._checkpoint, self._layouts, self._sources = checkpoint, layouts, sources
        self._done, self._total, self._progress = 0, total, progress
        most = max(layout.nbytes for own in layouts for layout in own)
        self._blob = torch.zeros(most, dtype=torch.uint8, device=device)

    def run(self, layer: int, module: Any, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
        """The layer's output [T, H]; its errors are added to `found`."""
        title = f"measuring layer {layer + 1} of {len(self._layouts)}"
        x, weights = hidden_states.float(), weights.float()
        out = torch.zeros_like(x)
        squares, errors = [], []
        for expert in range(len(self._checkpoint.layers[layer].experts)):
            self._progress(title, self._done, self._total)
            tokens, places = (top_k_index == expert).nonzero(as_tuple=True)  # [t] each
            share = weights[tokens, places, None]  # [t, 1]
            if not len(tokens):  # never used here, and still not free: as if the first token did
                tokens, share = tokens.new_zeros(1), weights.mean().view(1, 1)
            plain, changed = self._expert(module, self._layouts[layer], x[tokens])
            squares.append(_square_sum(plain * share))
            errors.append(tuple(_square_sum((other - plain) * share) for other in changed))
            if len(places):
                out.index_add_(0, tokens, plain * share)
        number = self._checkpoint.layers[layer].index
        self.found.append(LayerErrors(layer=number, squares=tuple(squares), errors=tuple(errors)))
        return out.to(hidden_states.dtype)

    def _expert(self, module: Any, layouts: Sequence[BlobLayout], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the next expert makes of x [t, H] as it is, and under every scheme."""
        sources = [next(self._sources) for _ in layouts[0].matrices]
        self._done += sum(tensor.nbytes for source in sources for _, tensor in source)
        plain, *changed = [self._output(module, layout, sources, x) for layout in layouts]
        return plain, changed

    def _output(self, module: Any, layout: BlobLayout, sources: Sequence[Source], x: Tensor) -> Tensor:
        for place, (matrix, source) in enumerate(zip(layout.matrices, sources, strict=True)):
            encode_source(self._checkpoint, matrix, source, quantizer_for(matrix.scheme), self._blob)
            restored = dequantize(matrix, parts_of(matrix, self._blob), torch.float32)
            x = multiply(matrix, restored, self._blob, module._apply_gate(x) if place else x)
        return x


def _square_sum(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
