"""What shards are made of, as tasks for reading ahead: one for each expert's matrix or resident tensor, in order.

The tasks only bring bytes to where they are needed; whether these are numbers is checked by who receives them, in the
thread that computes: a second thread in torch's CPU operations would start a second team of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layers import MoeLayer, Slice
from moeflow.artifact.overlap import Task, read_ahead
from moeflow.artifact.stored import refuse_nan
from moeflow.schema import BlobLayout, PackedMatrix

__all__ = ["Source", "check_numbers", "checked", "expert_sources", "resident_sources", "slices_of"]

CPU = torch.device("cpu")
Source = tuple[tuple[str, Tensor], ...]
"""Tensors, each with the name of the one on disk that it is from."""


def slices_of(matrix: PackedMatrix, parts: Mapping[str, Slice]) -> list[Slice]:
    """What an expert's `matrix` is made of: the weights whose rows it stacks, then its bias if it has one."""
    roles = [matrix.name] if matrix.name in parts else ["gate", "up"]
    return [parts[role] for role in [*roles, *([f"{matrix.name}_bias"] if matrix.bias else [])]]


def expert_sources(
    checkpoint: Checkpoint, layer: MoeLayer, blobs: Sequence[BlobLayout], device: torch.device
) -> Iterator[Task[Source]]:
    """A task for every matrix of every expert, whose layouts `blobs` are, read to `device`."""
    for parts, layout in zip(layer.experts, blobs, strict=True):
        for matrix in layout.matrices:
            slices = slices_of(matrix, parts)
            nbytes = sum(_nbytes(checkpoint, part) for part in slices)
            yield Task(nbytes, partial(_read_slices, checkpoint, slices, device))


def resident_sources(
    checkpoint: Checkpoint, packed: Mapping[str, PackedMatrix], device: torch.device
) -> Iterator[Task[Source]]:
    """A task for every resident tensor; those in `packed` are read to `device`, the rest to host memory."""
    for name, stored in checkpoint.resident.items():
        place = device if name in packed else CPU
        yield Task(checkpoint.tensors[stored].nbytes, partial(_read, checkpoint, stored, place))


def checked(checkpoint: Checkpoint, source: Source) -> list[Tensor]:
    """The source's tensors; one NaN would spoil a group of weights and every sum after it.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    for name, tensor in source:
        # The sum of finite numbers may overflow, but no sum with a NaN or an infinity is finite: one pass for most.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            refuse_nan(checkpoint.tensors[name], ~torch.isfinite(tensor))
    return [tensor for _, tensor in source]


def check_numbers(checkpoint: Checkpoint, tasks: Iterator[Task[Source]]) -> None:
    """Read all that a shard is made of, and write nothing.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    with read_ahead(tasks) as sources:
        for source in sources:
            checked(checkpoint, source)


def _nbytes(checkpoint: Checkpoint, part: Slice) -> int:
    info = checkpoint.tensors[part.tensor]
    return info.nbytes // (1 if part.expert is None else max(1, prod(info.shape[:1])))


def _read(checkpoint: Checkpoint, name: str, device: torch.device) -> Source:
    return ((name, checkpoint.read(name, device)),)


def _read_slices(checkpoint: Checkpoint, slices: list[Slice], device: torch.device) -> Source:
    return tuple((part.tensor, checkpoint.read_slice(part, device)) for part in slices)
