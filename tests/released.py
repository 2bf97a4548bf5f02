"""Checkpoints in the formats that gpt-oss and DeepSeek-V3 are released in, and the same weights as plain numbers.

Quantizers and their inverses are written here from the formats' definitions, for tiny models alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["E2M1", "as_fp8", "as_mxfp4", "block_scales", "release"]

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
LARGEST_E4M3 = 448.0

Tensors = dict[str, Tensor]
# Tensor -> what a release stores of it, by the end of its name, and its value; None leaves it as it is.
Quantizer = Callable[[str, Tensor], tuple[Tensors, Tensor] | None]


def release(source: Path, target: Path, quantizer: Quantizer, settings: dict[str, object]) -> tuple[Path, Path]:
    """`target/released`, quantized, and `target/plain`, whose weights are what the codes stand for."""
    released, plain = (Path(shutil.copytree(source, target / name)) for name in ("released", "plain"))
    codes: Tensors = {}
    values: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        quantized = quantizer(name, tensor)
        stored, values[name] = quantized if quantized else ({name: tensor}, tensor)
        codes |= stored
    save_file({n: t.contiguous() for n, t in codes.items()}, released / "model.safetensors", metadata={"format": "pt"})
    save_file({n: t.contiguous() for n, t in values.items()}, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return released, plain


def as_mxfp4(name: str, tensor: Tensor) -> tuple[Tensors, Tensor] | None:
    """Experts `[E, K, N]` as blocks of 32 along K, with the largest exponent that holds each block's largest number."""
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return None
    rows = tensor.float().transpose(1, 2)
    experts, outputs, inputs = rows.shape
    blocks = rows.reshape(experts, outputs, inputs // 32, 32)
    exponents = blocks.abs().amax(-1, keepdim=True).log2().floor() - 2
    scaled = blocks * torch.exp2(-exponents)
    codes = (scaled.unsqueeze(-1) - E2M1).abs().argmin(-1)
    value = (E2M1[codes] * torch.exp2(exponents)).reshape(rows.shape).transpose(1, 2).to(torch.bfloat16)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    scales = (exponents.squeeze(-1) + 127).to(torch.uint8)
    return {f"{name}_blocks": packed, f"{name}_scales": scales}, value


def block_scales(tensor: Tensor, block: tuple[int, int]) -> Tensor:
    """The scale of each block; those at the edges may be smaller."""
    rows = [band.abs() for band in tensor.float().split(block[0], dim=0)]
    grid = [[part.max() / LARGEST_E4M3 for part in band.split(block[1], dim=1)] for band in rows]
    return torch.tensor(grid)


def as_fp8(
    block: tuple[int, int] | None, scale_dtype: torch.dtype = torch.float32, ending: str = "_scale_inv"
) -> Quantizer:
    """Projections as e4m3 with a scale per block, or one for all."""

    def quantize(name: str, tensor: Tensor) -> tuple[Tensors, Tensor] | None:
        if "proj" not in name or not name.endswith(".weight"):
            return None
        size = block or (tensor.shape[0], tensor.shape[1])
        scales = block_scales(tensor, size)
        if scale_dtype == torch.float8_e8m0fnu:
            scales = torch.exp2(scales.log2().ceil())
        scales = scales.to(scale_dtype)
        wide = scales.float().repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
        wide = wide[: tensor.shape[0], : tensor.shape[1]]
        codes = (tensor.float() / wide).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
        value = (codes.float() * wide).to(torch.bfloat16)
        place = f"{name}{ending}" if ending.startswith("_") else name.removesuffix(".weight") + ending
        return {name: codes, place: scales if block else scales.reshape(())}, value

    return quantize
