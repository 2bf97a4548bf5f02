"""How a plain tensor is made of what a checkpoint has on disk: by reading it, or by dequantizing several.

A release may store one matrix as codes and scales. The rest of moeflow knows plain tensors alone, under the names
that an unquantized release would have: `info` describes the plain tensor, `parts` say where its bytes come from.
Headers are enough to make one; torch is imported when one is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from moeflow.artifact.safetensors import ITEM, TensorInfo, read_tensor
from moeflow.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["Stored", "Plain", "as_plain", "refuse_nan"]


@dataclass(frozen=True)
class Stored(ABC):
    """One plain tensor and where it comes from."""

    info: TensorInfo
    """Name, dtype, shape and size of the plain tensor, and the file that messages name."""

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors on disk that it is made of."""

    @abstractmethod
    def read(self, index: int | None = None, device: torch.device | None = None) -> torch.Tensor:
        """The plain tensor, or what is at `index` of its first dimension and nothing else; on `device`, or the CPU.

        Raises:
            CheckpointError: the file cannot be read, or holds encodings that are no numbers.
        """


@dataclass(frozen=True)
class Plain(Stored):
    """A tensor that is stored as it is."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:  # noqa: D102
        return (self.info,)

    def read(self, index: int | None = None, device: torch.device | None = None) -> torch.Tensor:  # noqa: D102
        return read_tensor(self.info, index, device)


def as_plain(part: TensorInfo, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """Describes the plain tensor `name` that `part` holds the codes of."""
    return replace(part, name=name, dtype=dtype, shape=shape, nbytes=prod(shape) * ITEM[dtype])


def refuse_nan(part: TensorInfo, wrong: torch.Tensor) -> None:
    """Refuse a tensor as read from `part`, where `wrong` marks encodings of NaN or infinity.

    Raises:
        CheckpointError: there are some.
    """
    if bool(wrong.any()):
        raise CheckpointError(
            f"{part.file}: {part.name} holds NaN or infinity in {int(wrong.sum())} of {wrong.numel()} numbers, "
            f"first at {wrong.nonzero()[0].tolist()}; fetch this file again"
        )
