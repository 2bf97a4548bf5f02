"""What experts travel over: the bus, its rate in large copies, and its rate by the size of a copy.

A part of a hardware profile. It refuses what no bus can do, since a slipped unit here makes every forecast wrong.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from moeflow.schema.base import Part
from moeflow.schema.units import Rate, Size, Spread, format_rate

__all__ = ["BusState", "Link", "LinkPoint", "Pcie"]

_TRANSFERS = {3: 8_000_000_000, 4: 16_000_000_000, 5: 32_000_000_000}  # a second and lane, by generation of PCIe


class Pcie(Part):
    """The bus between host and GPU, at most."""

    generation: int = Field(ge=3, le=5)
    """3, 4 or 5: those that send 130 bits for 128."""
    lanes: Literal[1, 2, 4, 8, 16]
    """Lanes that both ends have."""

    @property
    def peak(self) -> int:
        """Bytes a second in one direction: transfers a second x lanes x 128/130 bits, before packets' headers."""
        return _TRANSFERS[self.generation] * self.lanes * 128 // 130 // 8


class BusState(Part):
    """What the bus ran at. Idle ones are slowed down to save power, so it says something only under load."""

    generation: int = Field(ge=1, le=7)
    lanes: int = Field(ge=1, le=32)


class LinkPoint(Part):
    """Copies of one size, one after another."""

    nbytes: Size = Field(gt=0)
    """Bytes of one copy."""
    engine: Rate
    """By the copy engine; between buffers in host memory on a machine without GPU."""
    engine_spread: Spread | None = None
    kernel: Rate | None = None
    """By moeflow's copy kernel, which reads page-locked memory itself."""
    kernel_spread: Spread | None = None


class Link(Part):
    """What the experts travel over: PCIe, or memory to memory on a machine without GPU."""

    host_to_device: Rate
    """Bytes a second from page-locked host memory to the device, in large copies."""
    pcie: Pcie | None = None
    """The bus, where it is known."""
    under_load: BusState | None = None
    """What it ran at while copies were under way."""
    by_size: tuple[LinkPoint, ...] = ()
    """Small copies first."""

    @model_validator(mode="after")
    def _sizes_rise(self) -> Self:
        for before, after in pairwise(self.by_size):
            if after.nbytes <= before.nbytes:
                raise ValueError(
                    f"by_size has {after.nbytes} bytes behind {before.nbytes}; give each size once, rising"
                )
        return self

    @model_validator(mode="after")
    def _the_bus_can_carry_it(self) -> Self:
        if self.pcie and self.host_to_device > self.pcie.peak:
            bus = f"PCIe {self.pcie.generation}.0 x{self.pcie.lanes}"
            raise ValueError(
                f"host_to_device is {format_rate(self.host_to_device)}, more than {bus} can carry, "
                f"{format_rate(self.pcie.peak)}"
            )
        return self
