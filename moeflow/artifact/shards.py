"""Quantizes the tensors of one shard and writes them: a layer's experts, or all that is resident.

Memory stays at one matrix with what its quantization takes, what is read ahead of it, and two experts' blobs, whatever
the model's size: one blob is written while the next is filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layers import MoeLayer
from moeflow.artifact.matrix import encode, parts_of
from moeflow.artifact.overlap import WriteBehind
from moeflow.artifact.safetensors import ShardWriter, shard_writer
from moeflow.artifact.sources import Source, checked
from moeflow.quantization.base import Quantizer
from moeflow.quantization.registry import quantizer_for
from moeflow.schema import BlobLayout, PackedMatrix, Shard

__all__ = ["Written", "encode_source", "write_experts", "write_resident"]

_STORED = {"uint8": "U8", "int32": "I32", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Written:
    """A finished shard."""

    shard: Shard
    data_offset: int
    digests: tuple[str, ...]
    relative_error: float


class _Error:
    """Relative error over many matrices."""

    def __init__(self) -> None:
        self._error = self._weight = 0.0

    def add(self, squares: tuple[float, float]) -> None:
        self._error += squares[0]
        self._weight += squares[1]

    def relative(self) -> float:
        return round(math.sqrt(self._error / self._weight), 6) if self._weight else 0.0


def write_experts(
    path: Path,
    checkpoint: Checkpoint,
    layer: MoeLayer,
    blobs: Sequence[BlobLayout],
    device: torch.device,
    sources: Iterator[Source],
    advance: Callable[[int], None],
) -> Written:
    """Write one layer's blobs, `layers.L.experts.E`; `advance` is told the bytes of each.

    Args:
        path: of the shard.
        checkpoint: what it is made of, for messages.
        layer: its experts.
        blobs: the layout of each.
        device: quantizes and packs.
        sources: as `expert_sources` gives them, those of the layer first; what follows them is left.
        advance: called in this thread, when a blob is about to be written.
    """
    entries = [(f"layers.{layer.index}.experts.{e}", "U8", (layout.nbytes,)) for e, layout in enumerate(blobs)]
    quantizers = {s: quantizer_for(s) for s in dict.fromkeys(m.scheme for y in blobs for m in y.matrices)}
    on_cuda, most, alike = device.type == "cuda", max(layout.nbytes for layout in blobs), len(set(blobs)) == 1
    # Reused; the padding between parts stays zero.
    buffers = [torch.zeros(most, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(2)]
    packed = torch.zeros(most, dtype=torch.uint8, device=device) if on_cuda else None
    error = _Error()
    with shard_writer(path, entries) as writer, WriteBehind() as behind:
        for expert, layout in enumerate(blobs):
            host = buffers[expert % 2][: layout.nbytes]  # free: the write before the last one has ended
            blob = host if packed is None else packed[: layout.nbytes]
            if not alike:  # where this layout pads, the last one may have had a part
                blob.zero_()
            for matrix in layout.matrices:
                error.add(encode_source(checkpoint, matrix, next(sources), quantizers[matrix.scheme], blob))
            if packed is not None:
                host.copy_(blob)
            behind.submit(partial(writer.write, host.numpy().data))
            advance(layout.nbytes)
        behind.drain()
    return _written(writer, error)


def encode_source(
    checkpoint: Checkpoint, matrix: PackedMatrix, source: Source, quantizer: Quantizer, blob: Tensor
) -> tuple[float, float]:
    """Quantize what was read for `matrix` into `blob`; returns what `encode` does, and keeps no reference to it."""
    tensors = checked(checkpoint, source)
    weights, biases = (tensors[:-1], tensors[-1:]) if matrix.bias else (tensors, [])
    return encode(matrix, weights, quantizer, blob, biases)


def write_resident(
    path: Path,
    checkpoint: Checkpoint,
    packed: Mapping[str, PackedMatrix],
    sources: Iterator[Source],
    advance: Callable[[int], None],
) -> Written:
    """Write all that is no expert; matrices in `packed` as their parts, `NAME.PART`, the rest as it is.

    `sources` are those that `resident_sources` gives.
    """
    error = _Error()
    with shard_writer(path, _resident_entries(checkpoint, packed)) as writer:
        for name, stored in checkpoint.resident.items():
            if matrix := packed.get(name):
                last = matrix.segments[-1]
                source = next(sources)
                blob = torch.zeros(last.offset + last.nbytes, dtype=torch.uint8, device=source[0][1].device)
                error.add(encode_source(checkpoint, matrix, source, quantizer_for(matrix.scheme), blob))
                for part in parts_of(matrix, blob).values():
                    writer.write(_bytes(part))
            else:
                for tensor in checked(checkpoint, next(sources)):
                    writer.write(_bytes(tensor))
            advance(checkpoint.tensors[stored].nbytes)
    return _written(writer, error)


def _resident_entries(checkpoint: Checkpoint, packed: Mapping[str, PackedMatrix]) -> list[Any]:
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for name, stored in checkpoint.resident.items():
        if matrix := packed.get(name):
            entries += [(f"{name}.{s.part}", _STORED[s.dtype], s.shape) for s in matrix.segments]
        else:
            entries.append((name, checkpoint.tensors[stored].dtype, checkpoint.tensors[stored].shape))
    return entries


def _written(writer: ShardWriter, error: _Error) -> Written:
    return Written(writer.shard(), writer.data_offset, tuple(writer.digests), error.relative())


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes; numpy has no bfloat16, so all go through uint8."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
