"""MXFP4, as gpt-oss is released: 4-bit floats in blocks of 32 that share a power of two.

A matrix `X` of all experts is two tensors: `X_blocks` uint8 `[E, N, G, 16]` and `X_scales` uint8 `[E, N, G]`, G blocks
in each of N rows. A byte holds two e2m1 numbers, the lower four bits first; a scale is a biased exponent (e8m0).
In 16 bits the same matrix is `X` `[E, 32 * G, N]`: transformers' model wants it transposed. bfloat16 holds every
product exactly, up to its own largest number. Layout after OCP's Microscaling Formats 1.0 and transformers' mxfp4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeflow.artifact.safetensors import TensorInfo, read_tensor
from moeflow.artifact.stored import Plain, Stored, as_plain, refuse_nan
from moeflow.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["Mxfp4", "exponents", "mxfp4_tensors"]

BLOCKS, SCALES = "_blocks", "_scales"
PAIRS = 16  # bytes in a block
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NAN = 255  # the one e8m0 encoding that is no number
BIAS = 127


@dataclass(frozen=True)
class Mxfp4(Stored):
    """One matrix of all experts of a layer."""

    blocks: TensorInfo
    scales: TensorInfo

    @property
    def parts(self) -> tuple[TensorInfo, ...]:  # noqa: D102
        return (self.blocks, self.scales)

    def read(self, index: int | None = None, device: torch.device | None = None) -> torch.Tensor:
        """bfloat16 or float32 `[E, inputs, outputs]`; of one expert, a view that is contiguous when transposed."""
        import torch

        exponent = read_tensor(self.scales, index, device)
        refuse_nan(self.scales, exponent == NAN)
        e2m1 = torch.tensor(E2M1)
        byte = torch.arange(256)
        values = torch.stack([e2m1[byte & 15], e2m1[byte >> 4]], dim=-1).to(device)  # [256, 2]
        blocks = values[read_tensor(self.blocks, index, device).int()].flatten(-2)  # [.., N, G, 32]
        rows = blocks.mul_(exponents(exponent).unsqueeze(-1)).flatten(-2)  # [.., N, 32 * G]
        return rows.to(torch.float32 if self.info.dtype == "F32" else torch.bfloat16).transpose(-1, -2)


def exponents(codes: torch.Tensor) -> torch.Tensor:
    """float32 powers of two of e8m0 codes (uint8); 255 becomes NaN."""
    import torch

    table = torch.ldexp(torch.ones(256), torch.arange(256) - BIAS)
    table[NAN] = torch.nan
    return table.to(codes.device)[codes.int()]


def mxfp4_tensors(headers: Mapping[str, TensorInfo], dtype: str, place: Path) -> dict[str, Stored]:
    """Every plain tensor of a checkpoint; matrices in MXFP4 become `dtype`.

    Args:
        headers: what is on disk.
        dtype: BF16 or F32.
        place: for messages.

    Raises:
        CheckpointError: blocks without scales, scales without blocks, or shapes that do not belong together.
    """
    found: dict[str, Stored] = {}
    for name, info in headers.items():
        if info.dtype == "U8" and name.endswith(BLOCKS):
            plain = name.removesuffix(BLOCKS)
            found[plain] = _matrix(plain, info, headers.get(plain + SCALES), dtype, place)
        elif info.dtype == "U8" and name.endswith(SCALES):
            blocks = name.removesuffix(SCALES) + BLOCKS
            if blocks not in headers:
                raise CheckpointError(f"{place}: {name} has no {blocks} beside it; the download may be incomplete")
        else:
            found[name] = Plain(info)
    return found


def _matrix(plain: str, blocks: TensorInfo, scales: TensorInfo | None, dtype: str, place: Path) -> Mxfp4:
    if scales is None:
        raise CheckpointError(
            f"{place}: {blocks.name} has no {plain}{SCALES} beside it; the download may be incomplete"
        )
    wanted = blocks.shape[:-1]
    if len(blocks.shape) != 4 or blocks.shape[-1] != PAIRS or scales.shape != wanted or scales.dtype != "U8":
        raise CheckpointError(
            f"{place}: {blocks.name} has shape {list(blocks.shape)} and its scales {list(scales.shape)} in "
            f"{scales.dtype}; mxfp4 has [experts, outputs, blocks, {PAIRS}] and [experts, outputs, blocks] in U8"
        )
    experts, outputs, count = wanted
    return Mxfp4(as_plain(blocks, plain, dtype, (experts, 2 * PAIRS * count, outputs)), blocks, scales)
