"""The least memory that a model would run with, and what a machine lacks: what a refusal says would have to change.

Found by asking the planner again with other limits, so that it is what a plan would take, to the MiB. Device and host
memory are asked about one by one, with as much as one likes of the other; disk stays as the profile allows it.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal

from moeflow.errors import CapacityError
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import HardwareProfile, Profile

__all__ = ["MIB", "least", "refusals"]

MIB = 1 << 20
BOUNDLESS = 1 << 60
MOST = 1 << 24  # MiB that are looked through

Which = Literal["vram", "ram"]


def least(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile, which: Which) -> int:
    """The least `memory.vram` or `memory.ram`, in bytes, with which there is a plan if the other is no matter.

    Raises:
        CapacityError: no memory would do.
    """
    plenty, free = _machine(hardware, vram=True, ram=True), _limited(profile, vram=None, ram=None)
    if refusal := _refusal(free, sizes, plenty):
        raise CapacityError(refusal)
    limited = range(MOST)
    return MIB * bisect_left(
        limited, True, key=lambda count: not _refusal(_limited(free, **{which: count * MIB}), sizes, plenty)
    )


def refusals(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile) -> list[str]:
    """What is too small: device memory, host memory or both, each with what is needed and what there is."""
    asked = [
        _refusal(_limited(profile, ram=None), sizes, _machine(hardware, ram=True)),
        _refusal(_limited(profile, vram=None), sizes, _machine(hardware, vram=True)),
    ]
    both = _refusal(profile, sizes, hardware)  # without a GPU they share one memory, which may hold each but not both
    return [text for text in asked if text] or [both]


def _machine(hardware: HardwareProfile, vram: bool = False, ram: bool = False) -> HardwareProfile:
    """The same with as much memory as one likes."""
    gpu = hardware.gpu
    if gpu is not None and vram:
        gpu = gpu.model_copy(update={"memory": BOUNDLESS})
    more = ram or (gpu is None and vram)
    return hardware.model_copy(update={"gpu": gpu, "ram": BOUNDLESS if more else hardware.ram})


def _limited(profile: Profile, **limits: int | None) -> Profile:
    """With other limits; None is none."""
    memory = {name: "auto" if limit is None else limit for name, limit in limits.items()}
    return profile.model_copy(update={"memory": profile.memory.model_copy(update=memory)})


def _refusal(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile) -> str:
    try:
        make_plan(profile, sizes, hardware)
    except CapacityError as refusal:
        return str(refusal)
    return ""
