"""Rotary tables of a model that makes its frequencies anew at every pass, on the CPU: PhiMoE.

A CUDA graph can hold neither their copy to the device nor the question how long the sequence is, which transformers
asks there on the host to choose between two scales. Here frequencies and both scales lie on the device from the start.
As with the other parts, it stands in only where it equals transformers' own, and only inside `Fused.active()`; tables
that a buffer of the module serves are left alone, because a graph can hold them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from moeflow.model.fused import Fused
    from moeflow.model.fused_parts import Scope

__all__ = ["fuse_positions"]

PART = "rotary tables"
ANY_LENGTH = 1 << 40
TOLERANCE = 1e-5  # of cosines in float32

Tables = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.inference_mode()
def fuse_positions(fused: Fused, model: nn.Module) -> None:
    """Modules whose forward pass calls their `rope_init_fn`."""
    for name, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None or "rope_init_fn" not in code.co_names:
            continue
        device = next(model.parameters()).device
        try:
            tables, limit = _tables(module, device)
            same = _same(module, tables, limit, device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            fused.declined(PART, f"{name}: {type(error).__name__}: {error}")
            continue
        if same:
            fused.replace(PART, module, "forward", _forward(fused.scope, module, tables))
        else:
            fused.declined(PART, f"{name} computes something else")


def _tables(module: Any, device: torch.device) -> tuple[Tables, int]:
    """What computes cosines and sines [1, T, D], and the length beyond which it takes the other scale."""
    frequencies, scaling = module.rope_init_fn(module.config)
    settings = module.config.rope_parameters
    short = long = float(scaling)
    limit = ANY_LENGTH
    if settings["rope_type"] != "default":
        short, long = float(settings["short_mscale"]), float(settings["long_mscale"])
        limit = int(settings["original_max_position_embeddings"])
    frequencies = frequencies.to(device, torch.float32)
    below, above = torch.tensor(short, device=device), torch.tensor(long, device=device)

    def tables(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * frequencies  # [1, T, D / 2]
        angles = torch.cat((angles, angles), dim=-1)
        scale = torch.where(positions.max() >= limit, above, below)
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)

    return tables, limit


def _same(module: Any, tables: Tables, limit: int, device: torch.device) -> bool:
    """Whether `tables` is the module's own forward pass, far beyond, at and below the limit."""
    x = torch.zeros(1, device=device)
    starts = [3, 0] if limit == ANY_LENGTH else [2 * limit, limit - 3, limit - 8, 0]
    for start in starts:  # the shortest last: the module may remember how long the last sequence was
        positions = torch.arange(max(0, start), max(0, start) + 8, device=device)[None]
        for found, expected in zip(tables(x, positions), module(x, positions), strict=True):
            if not torch.allclose(found, expected, rtol=0, atol=TOLERANCE):
                return False
    return True


def _forward(scope: Scope, module: Any, tables: Tables) -> Callable[..., Any]:
    original = module.forward

    def forward(x: Tensor, position_ids: Tensor | None = None, *rest: Any, **options: Any) -> Any:
        if not scope.entered or position_ids is None or rest or options:
            return original(x, position_ids, *rest, **options)
        return tables(x, position_ids)

    return forward
