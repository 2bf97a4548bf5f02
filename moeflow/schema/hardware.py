"""What a machine is: a file in `hardware/` that can be shared, because it names no host and no user.

Numbers are either measured by `moeflow probe` or taken from data sheets; `origin` says which.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moeflow.schema.base import Document, Part
from moeflow.schema.units import Rate, Size

__all__ = ["Gpu", "Cpu", "Link", "Disk", "HardwareProfile"]


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


class Link(Part):
    """What the experts travel over: PCIe, or memory to memory on a machine without GPU."""

    host_to_device: Rate
    """Bytes a second from page-locked host memory to the device, in large copies."""


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

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Where the model runs on this machine."""
        return "cuda" if self.gpu else "cpu"
