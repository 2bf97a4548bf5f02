"""What a machine is: a file in `hardware/` that can be shared, because it names no host and no user.

Rates are either measured by `moeflow probe` or taken from data sheets; `origin` says which. Files that mix both say
it for each value in `sources`, so that a maker's peak is never taken for a measurement. What a source says is for
people; nothing is computed from it.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moeflow.schema.base import Document, Part
from moeflow.schema.kernels import CpuKernels, Kernels
from moeflow.schema.link import Link
from moeflow.schema.units import Rate, Size, Spread

__all__ = ["Gpu", "Cpu", "Disk", "Probed", "HardwareProfile"]

SOURCE = r"^(measured|datasheet|derived|assumed)\b"


class Gpu(Part):
    """One accelerator."""

    name: str
    """As the driver names it; a probed machine is matched to a file by this."""
    memory: Size = Field(gt=0)
    """All of its memory."""
    compute_capability: str = Field(pattern=r"^\d+\.\d+$")
    """CUDA compute capability, such as "8.6"."""
    memory_bandwidth: Rate | None = None
    """Device memory, bytes a second."""
    kernels: Kernels | None = None
    """The engine's own; None where they were not measured."""


class Cpu(Part):
    """The host's processor."""

    name: str = ""
    """As the operating system names it."""
    cores: int = Field(ge=1)
    """Physical cores that this process may use."""
    memory_bandwidth: Rate | None = None
    """Bytes a second that all cores together read from host memory."""
    instruction_sets: tuple[str, ...] = ()
    """Those that kernels may be written for, as Linux names them: `avx2`, `avx512_vnni`, `amx_int8`."""
    # Left out of files that do not say it, which keep their digests.
    kernels: CpuKernels | None = Field(default=None, exclude_if=lambda kernels: kernels is None)
    """The engine's own; None where they were not measured."""


class Disk(Part):
    """The disk that holds artifacts."""

    read: Rate
    """Sequential bytes a second."""
    random_read: Rate | None = None
    """Bytes a second of reads at random places, `blob` bytes at a time."""
    blob: Size | None = None
    """Bytes of one random read: an expert's, or about so many."""

    @model_validator(mode="after")
    def _random_reads_have_a_size(self) -> Self:
        if (self.random_read is None) != (self.blob is None) or self.blob == 0:
            raise ValueError("random_read is a rate at one size: give both random_read and blob, or neither")
        return self


class Probed(Part):
    """When and with what a file was measured. A version is None where its software had no part in it."""

    date: datetime.date
    moeflow: str
    torch: str | None = None
    cuda: str | None = None
    """The CUDA that torch was built with."""
    driver: str | None = None
    """NVIDIA's driver."""


class HardwareProfile(Document):
    """A machine: `hardware/NAME.yaml`."""

    kind: ClassVar[str] = "hardware profile"

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """The file's name, without its ending."""
    description: str = ""
    """One line for people: board, bus, where the numbers come from."""
    origin: Literal["measured", "datasheet", "derived"]
    """Whether the rates were measured on such a machine, are its makers' peaks, or follow from what the machine has."""
    gpu: Gpu | None = None
    """None: experts are computed on the CPU and slots lie in host memory."""
    cpu: Cpu
    ram: Size = Field(gt=0)
    """All of the host's memory."""
    ram_lockable: Size | None = None
    """How much of it may be page-locked for the device."""
    link: Link
    disk: Disk | None = None
    sources: dict[str, Annotated[str, Field(pattern=SOURCE)]] = Field(default_factory=dict)
    """By value, such as `gpu.memory`: measured, datasheet, derived or assumed, and then where or how."""
    spreads: dict[str, Spread] = Field(default_factory=dict)
    """By value: how far repeats lay apart. Those of `link.by_size` stand with its points."""
    probed: Probed | None = None
    """None: not by `moeflow probe`, or by one that did not say."""

    @model_validator(mode="after")
    def _sources_name_values(self) -> Self:
        known = self.values()
        for key in ("sources", "spreads"):
            for name in getattr(self, key):
                if name not in known:
                    raise ValueError(f"{key}.{name} names no value of this profile; known: {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _no_more_is_lockable_than_there_is(self) -> Self:
        if self.ram_lockable is not None and self.ram_lockable > self.ram:
            raise ValueError(f"ram_lockable is {self.ram_lockable} bytes; ram has {self.ram}")
        return self

    def values(self) -> dict[str, Any]:
        """What the profile says of the machine, by the names that `sources` uses; empty and absent ones left out."""
        found: dict[str, Any] = {}
        for part in ("gpu", "cpu", "ram", "ram_lockable", "link", "disk"):
            value = getattr(self, part)
            inner = {part: value}
            if isinstance(value, Part):
                inner = {f"{part}.{name}": getattr(value, name) for name in type(value).model_fields}
            found |= {name: value for name, value in inner.items() if value not in (None, "", ())}
        return found

    def source(self, value: str) -> str:
        """Where `value` comes from; `origin` where the file does not say it of each."""
        return self.sources.get(value, self.origin)

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Where the model runs on this machine."""
        return "cuda" if self.gpu else "cpu"
