"""The device of a plan, its memory, and what to say when it is refused."""

from __future__ import annotations

import gc

import torch

from moeflow.errors import DeviceError
from moeflow.schema import Plan
from moeflow.schema.units import format_size

__all__ = ["device_of", "refusal", "release_memory"]


def device_of(plan: Plan) -> torch.device:
    """Where the plan's slots are.

    Raises:
        DeviceError: the plan is for CUDA and there is none.
    """
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"the plan is for CUDA ({plan.hardware}), and torch finds no CUDA device here; "
            "plan for this machine with hardware=auto (`--hardware auto`)"
        )
    return torch.device(plan.device)


def refusal(plan: Plan, held: int = 0) -> str:
    """What was planned, what is free, and what would fit, after the device refused memory.

    Args:
        plan: the plan that did not fit.
        held: bytes that this process holds of what is not free.
    """
    most = max(plan.cache_slots)
    said = f"device memory was refused: the plan for {plan.hardware} takes {format_size(plan.memory.total)}, "
    fits = ""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] + held
        said += f"{format_size(free)} free now, "
        if most and free < plan.memory.total:
            per_slot = plan.memory.slots // most
            fitting = most - -(-(plan.memory.total - free) // max(1, per_slot))
            fits = f", of which {fitting} would fit" if fitting >= 0 else ", of which not even 0 would fit"
    return (
        f"{said}of which {format_size(plan.memory.slots)} for {most} experts per layer{fits}; end other programs "
        "that use the device, or lower memory.vram, cache.experts_per_layer or context_length"
    )


def release_memory(device: torch.device) -> None:
    """Give back what nobody uses; models hold themselves in reference cycles, cuBLAS a workspace a stream."""
    gc.collect()
    if device.type == "cuda":
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # no public way
        if clear is not None:
            clear()
        torch.cuda.empty_cache()
