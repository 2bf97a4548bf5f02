"""What a machine is: a file in `hardware/` that can be shared, because it names no host and no user.

Rates are either measured by `moeflow probe` or taken from data sheets; `origin` says which. Files that mix both say
it for each value in `sources`, so that a maker's peak is never taken for a measurement. What a source says is for
people; nothing is computed from it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moeflow.schema.base import Document, Part
from moeflow.schema.units import Rate, Size

__all__ = ["Gpu", "Cpu", "Pcie", "Link", "Disk", "HardwareProfile"]

SOURCE = r"^(measured|datasheet|derived|assumed)\b"
_TRANSFERS = {3: 8_000_000_000, 4: 16_000_000_000, 5: 32_000_000_000}  # a second and lane, by generation of PCIe


class Gpu(Part):
    """One accelerator."""

    name: str
    """As the driver names it; a probed machine is matched to a file by this."""
    memory: Size
    """All of its memory."""
    compute_capability: str = Field(pattern=r"^\d+\.\d+$")
    """CUDA compute capability, such as "8.6"."""
    memory_bandwidth: Rate | None = None
    """Device memory, bytes a second."""


class Cpu(Part):
    """The host's processor."""

    name: str = ""
    """As the operating system names it."""
    cores: int = Field(ge=1)
    """Physical cores that this process may use."""
    memory_bandwidth: Rate | None = None
    """Bytes a second that all cores together read from host memory."""


class Pcie(Part):
    """The bus between host and GPU."""

    generation: int = Field(ge=3, le=5)
    """3, 4 or 5: those that send 130 bits for 128."""
    lanes: Literal[1, 2, 4, 8, 16]
    """Lanes that both ends have."""

    @property
    def peak(self) -> int:
        """Bytes a second in one direction: transfers a second x lanes x 128/130 bits, before packets' headers."""
        return _TRANSFERS[self.generation] * self.lanes * 128 // 130 // 8


class Link(Part):
    """What the experts travel over: PCIe, or memory to memory on a machine without GPU."""

    host_to_device: Rate
    """Bytes a second from page-locked host memory to the device, in large copies."""
    pcie: Pcie | None = None
    """The bus, where it is known."""


class Disk(Part):
    """The disk that holds artifacts."""

    read: Rate
    """Sequential bytes a second."""


class HardwareProfile(Document):
    """A machine: `hardware/NAME.yaml`."""

    kind: ClassVar[str] = "hardware profile"

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """The file's name, without its ending."""
    description: str = ""
    """One line for people: board, bus, where the numbers come from."""
    origin: Literal["measured", "datasheet"]
    """Whether the rates were measured on such a machine or are its makers' peaks."""
    gpu: Gpu | None = None
    """None: experts are computed on the CPU and slots lie in host memory."""
    cpu: Cpu
    ram: Size
    """All of the host's memory."""
    link: Link
    disk: Disk | None = None
    sources: dict[str, Annotated[str, Field(pattern=SOURCE)]] = Field(default_factory=dict)
    """By value, such as `gpu.memory`: measured, datasheet, derived or assumed, and then where or how."""

    @model_validator(mode="after")
    def _sources_name_values(self) -> Self:
        known = self.values()
        for name in self.sources:
            if name not in known:
                raise ValueError(f"sources.{name} names no value of this profile; known: {', '.join(known)}")
        return self

    def values(self) -> dict[str, Any]:
        """What the profile says of the machine, by the names that `sources` uses; empty and absent ones left out."""
        found: dict[str, Any] = {}
        for part in ("gpu", "cpu", "ram", "link", "disk"):
            value = getattr(self, part)
            inner = {part: value}
            if isinstance(value, Part):
                inner = {f"{part}.{name}": getattr(value, name) for name in type(value).model_fields}
            found |= {name: value for name, value in inner.items() if value not in (None, "")}
        return found

    def source(self, value: str) -> str:
        """Where `value` comes from; `origin` where the file does not say it of each."""
        return self.sources.get(value, self.origin)

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Where the model runs on this machine."""
        return "cuda" if self.gpu else "cpu"
