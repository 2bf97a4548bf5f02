"""FP8, as DeepSeek-V3 is released: e4m3 weights, and a scale for each block of them, for each row, or for all.

Beside a weight `[.., N, K]` lie its scales `[.., ceil(N / n), ceil(K / k)]`, where the config says `weight_block_size:
[n, k]`; blocks at the edges may be smaller. A scale of one number is the whole tensor's (of each expert's, where the
weight holds all experts). The value is weight * scale in float32, rounded once. Names and variants after transformers'
finegrained fp8; scales of activations are not needed, because activations stay in 16 bits here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.artifact.mxfp4 import exponents
from moeflow.artifact.safetensors import TensorInfo, read_tensor
from moeflow.artifact.stored import Plain, Stored, as_plain, refuse_nan
from moeflow.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["Fp8", "fp8_tensors"]

E4M3 = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
ACTIVATIONS = (".activation_scale", ".input_scale", ".qscale_act")


@dataclass(frozen=True)
class Fp8(Stored):
    """One weight and its scales."""

    weight: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]
    """Rows and columns that share a scale."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:  # noqa: D102
        return (self.weight, self.scales)

    def read(self, index: int | None = None, device: torch.device | None = None) -> torch.Tensor:
        """bfloat16 or float32, in the weight's own shape."""
        import torch

        weight = read_tensor(self.weight, index, device)
        refuse_nan(self.weight, (weight.view(torch.uint8) & 127) == 127)
        grid = self._grid(index, device)
        rows, columns = self.block
        dtype = torch.float32 if self.info.dtype == "F32" else torch.bfloat16
        wide = grid.repeat_interleave(columns, -1)[..., : weight.shape[-1]]  # [.., grid rows, K]
        bands = [  # a band of blocks at a time: in float32 the whole weight would take four times its bytes
            (band.float() * wide[..., i : i + 1, :]).to(dtype)
            for i, band in enumerate(torch.split(weight, rows, dim=-2))
        ]
        return torch.cat(bands, dim=-2)

    def _grid(self, index: int | None, device: torch.device | None) -> torch.Tensor:
        """Scales in float32, `[.., N / n, K / k]`."""
        import torch

        per_expert = len(self.weight.shape) == 3 and self.scales.shape[:1] == self.weight.shape[:1]
        stored = read_tensor(self.scales, index if per_expert else None, device)
        powers = self.scales.dtype in ("F8_E8M0", "U8")
        grid = exponents(stored.view(torch.uint8)) if powers else stored.float()
        refuse_nan(self.scales, ~torch.isfinite(grid))
        if grid.dim() == 1 and index is None and per_expert:
            return grid.view(-1, 1, 1)
        return grid.view(1, 1) if grid.numel() == 1 else grid


def fp8_tensors(
    headers: Mapping[str, TensorInfo], dtype: str, settings: Mapping[str, Any], place: Path
) -> dict[str, Stored]:
    """Every plain tensor of a checkpoint; weights in FP8 become `dtype`.

    Args:
        headers: what is on disk.
        dtype: BF16 or F32.
        settings: the config's `quantization_config`.
        place: for messages.

    Raises:
        CheckpointError: a weight has no scales or scales of another shape, or scales belong to no weight in FP8.
    """
    coded = (name for name, info in headers.items() if info.dtype == E4M3)
    scales = {name: beside for name in coded if (beside := _scales(name, headers))}
    used = {info.name for info in scales.values()}
    block = _block_size(settings, place)
    found: dict[str, Stored] = {}
    for name, info in headers.items():
        if name in used or name.endswith(ACTIVATIONS):
            continue
        if info.dtype == E4M3:
            if name not in scales:
                raise CheckpointError(
                    f"{place}: {name} is stored as {E4M3} and has no scales beside it "
                    f"({', '.join(_scale_names(name))}); the download may be incomplete"
                )
            found[name] = _weight(info, scales[name], block, dtype, place)
        elif name.endswith("_scale_inv"):
            weight = headers.get(name.removesuffix("_scale_inv"))
            what = f"a weight that is stored as {weight.dtype}, not {E4M3}" if weight else "a weight that is not there"
            raise CheckpointError(f"{place}: {name} has the scales of {what}; the download may be incomplete")
        else:
            found[name] = Plain(info)
    return found


def _scale_names(name: str) -> tuple[str, ...]:
    """Where the scales of a weight may be."""
    stem = name.removesuffix(".weight")
    return (f"{name}_scale_inv", *((f"{stem}.scale", f"{stem}.qscale_weight") if stem != name else ()))


def _scales(name: str, headers: Mapping[str, TensorInfo]) -> TensorInfo | None:
    return next((headers[scale] for scale in _scale_names(name) if scale in headers), None)


def _block_size(settings: Mapping[str, Any], place: Path) -> tuple[int, int] | None:
    found = settings.get("weight_block_size")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int or n < 1 for n in found):
        raise CheckpointError(
            f"{place}: quantization_config.weight_block_size is {found!r}; it must be two whole numbers: rows, columns"
        )
    return found[0], found[1]


def _weight(weight: TensorInfo, scales: TensorInfo, block: tuple[int, int] | None, dtype: str, place: Path) -> Fp8:
    size = _shared(weight.shape, scales.shape, block)
    if size is None or scales.dtype not in SCALE_DTYPES:
        wanted = f"blocks of {block[0]} x {block[1]}" if block else "one number, or a grid that divides the weight"
        raise CheckpointError(
            f"{place}: {weight.name} has shape {list(weight.shape)} and its scales {scales.name} "
            f"{list(scales.shape)} in {scales.dtype}; needed are scales of {wanted} in {', '.join(SCALE_DTYPES)}"
        )
    return Fp8(as_plain(weight, weight.name, dtype, weight.shape), weight, scales, size)


def _shared(weight: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if the shapes do not belong together."""
    if len(weight) < 2 or 0 in weight:
        return None
    rows, columns = weight[-2:]
    per_expert = len(weight) == 3 and scales == weight[:1]
    if per_expert or (prod(scales) == 1 and (len(scales) < 2 or prod(weight[:-2]) == 1)):
        return rows, columns
    if scales[:-2] != weight[:-2] or len(scales) != len(weight) or 0 in scales:
        return None
    if block and scales[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    if rows % scales[-2] or columns % scales[-1]:
        return None
    return rows // scales[-2], columns // scales[-1]
