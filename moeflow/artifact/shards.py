"""Quantizes the tensors of one shard and writes them: a layer's experts, or all that is resident.

Memory stays at one expert (or one resident tensor) and its codes, whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layers import MoeLayer, Slice
from moeflow.artifact.matrix import encode, parts_of
from moeflow.artifact.safetensors import ShardWriter, shard_writer
from moeflow.artifact.stored import refuse_nan
from moeflow.quantization.registry import quantizer_for
from moeflow.schema import BlobLayout, PackedMatrix, Shard

__all__ = ["Written", "check_numbers", "write_experts", "write_resident"]

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
    layout: BlobLayout,
    device: torch.device,
    advance: Callable[[int], None],
) -> Written:
    """Write one layer's blobs, `layers.L.experts.E`; `advance` is told the bytes of each."""
    entries = [(f"layers.{layer.index}.experts.{e}", "U8", (layout.nbytes,)) for e in range(len(layer.experts))]
    quantizers = {m.name: quantizer_for(m.scheme) for m in layout.matrices}
    blob = torch.zeros(layout.nbytes, dtype=torch.uint8)  # reused; the padding between parts stays zero
    error = _Error()
    with shard_writer(path, entries) as writer:
        for parts in layer.experts:
            for matrix in layout.matrices:
                roles = [matrix.name] if matrix.name in parts else ["gate", "up"]
                weights = [_read_slice(checkpoint, parts[role], device) for role in roles]
                biases = [_read_slice(checkpoint, parts[f"{matrix.name}_bias"], device)] if matrix.bias else []
                error.add(encode(matrix, weights, quantizers[matrix.name], blob, biases))
            writer.write(blob.numpy().data)
            advance(layout.nbytes)
    return _written(writer, error)


def write_resident(
    path: Path,
    checkpoint: Checkpoint,
    packed: Mapping[str, PackedMatrix],
    device: torch.device,
    advance: Callable[[int], None],
) -> Written:
    """Write all that is no expert; matrices in `packed` as their parts, `NAME.PART`, the rest as it is."""
    error = _Error()
    with shard_writer(path, _resident_entries(checkpoint, packed)) as writer:
        for name, stored in checkpoint.resident.items():
            tensor = _read(checkpoint, stored, torch.device("cpu"))
            if matrix := packed.get(name):
                last = matrix.segments[-1]
                blob = torch.zeros(last.offset + last.nbytes, dtype=torch.uint8)
                error.add(encode(matrix, [tensor.to(device)], quantizer_for(matrix.scheme), blob))
                for part in parts_of(matrix, blob).values():
                    writer.write(_bytes(part))
            else:
                writer.write(_bytes(tensor))
            advance(checkpoint.tensors[stored].nbytes)
    return _written(writer, error)


def check_numbers(checkpoint: Checkpoint, layer: MoeLayer | None) -> None:
    """Read all that a layer's shard is made of, or the resident one, and write nothing.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    cpu = torch.device("cpu")
    if layer is None:
        for name in checkpoint.resident.values():
            _read(checkpoint, name, cpu)
        return
    for parts in layer.experts:
        for part in parts.values():
            _read_slice(checkpoint, part, cpu)


def _read(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    """A tensor of the checkpoint, on `device`; one NaN would spoil a group of weights and every sum after it."""
    return _finite(checkpoint, name, checkpoint.read(name).to(device))


def _read_slice(checkpoint: Checkpoint, part: Slice, device: torch.device) -> Tensor:
    """One array of an expert, on `device`."""
    return _finite(checkpoint, part.tensor, checkpoint.read_slice(part).to(device))


def _finite(checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        refuse_nan(checkpoint.tensors[name], ~torch.isfinite(tensor))
    return tensor


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
