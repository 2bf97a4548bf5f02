"""What packing a profile would make, and take: sizes by role, disk, memory, time; nothing is written.

The time is an estimate from rates that are stated with it, and called assumed where nobody has measured them. Imports
no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from moeflow.artifact.blueprint import Blueprint
from moeflow.artifact.outline import Outline
from moeflow.artifact.role_sizes import RoleSize, role_sizes
from moeflow.errors import MoeflowError
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.planning.standin import NOTE
from moeflow.schema import AutoBits, BitsAndBytesScheme, HardwareProfile, Plan, Profile, Scheme
from moeflow.schema.units import format_rate

__all__ = ["Forecast", "Work", "forecast"]

# Weights a second and core, encoded and compared with the original, as measured on two cores of a server.
CORE_RATES = {"hqq": 0.6e6, "nf4": 6e6, "int8": 15e6, "none": 40e6}
# Bytes of device memory moved per weight. hqq: 62 ms for 14336 x 4096 weights at 2 bits on an H100 of 2.95 TB/s, its
# libraries' start not counted; the others: some passes over float32, not measured.
GPU_TRAFFIC = {"hqq": 3100, "nf4": 200, "int8": 100, "none": 20}
DISK = 500_000_000  # bytes/s, where the hardware profile knows no disk


@dataclass(frozen=True)
class Work:
    """A part of packing, and the rate that its time is taken from."""

    what: str
    seconds: float
    rate: str


@dataclass(frozen=True)
class Forecast:
    """What a pack would do."""

    model: str
    origin: str
    """Where shapes come from."""
    output: str
    roles: tuple[RoleSize, ...]
    checkpoint_nbytes: int
    disk_free: int
    plan: Plan | None
    refusal: str
    """Why there is no plan: what `pack` would say."""
    work: tuple[Work, ...]
    note: str = ""
    """What the experts' sizes are, where bits are yet to be chosen."""

    @property
    def disk_needed(self) -> int:
        """Bytes of the artifact's shards."""
        return sum(role.nbytes for role in self.roles)

    @property
    def seconds(self) -> float:
        """Of packing: the parts run beside each other, so the longest."""
        return max(part.seconds for part in self.work)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        plain["roles"] = [role.to_dict() for role in self.roles]
        plain["plan"] = self.plan.to_dict() if self.plan else None
        return {**plain, "disk_needed": self.disk_needed, "seconds": round(self.seconds, 1)}


def forecast(
    profile: Profile,
    known: Outline,
    hardware: HardwareProfile,
    output: str,
    disk_free: int,
    auto: AutoBits | None = None,
) -> Forecast:
    """What packing `profile` into `output` would make; `auto` is what its experts' schemes stand for.

    Raises:
        DocumentError: a scheme does not fit the model.
    """
    blueprint = Blueprint(known.checkpoint, profile.model, profile.quantization)
    roles = role_sizes(blueprint)
    plan, refusal = None, ""
    try:
        plan = make_plan(profile, ModelSizes.of_checkpoint(known.checkpoint, profile.quantization), hardware)
    except MoeflowError as error:
        refusal = str(error)
    return Forecast(
        model=profile.model,
        origin=known.origin,
        output=output,
        roles=roles,
        checkpoint_nbytes=known.nbytes,
        disk_free=disk_free,
        plan=plan,
        refusal=refusal,
        work=tuple(_work(roles, known.nbytes, hardware)),
        note=NOTE.format(units=auto.units, budget=auto.budget) if auto else "",
    )


def _work(roles: Iterable[RoleSize], checkpoint: int, hardware: HardwareProfile) -> Iterator[Work]:
    disk = hardware.disk.read if hardware.disk else DISK
    stated = f"{format_rate(disk)}, {'the disk of ' + hardware.name if hardware.disk else 'assumed'}"
    yield Work("read the checkpoint", checkpoint / disk, stated)
    by_kind: dict[str, int] = {}
    for role in roles:
        by_kind[_kind(role.scheme)] = by_kind.get(_kind(role.scheme), 0) + role.weights
    for kind, weights in by_kind.items():
        if hardware.gpu and hardware.gpu.memory_bandwidth:
            rate, on = hardware.gpu.memory_bandwidth / GPU_TRAFFIC[kind], f"assumed for {hardware.gpu.name}"
        else:
            rate, on = hardware.cpu.cores * CORE_RATES[kind], f"on {hardware.cpu.cores} cores"
        what = "copy what stays as it is" if kind == "none" else f"quantize, {kind}"
        yield Work(what, weights / rate, f"{rate / 1e6:.3g} million weights/s {on}")
    written = sum(role.nbytes for role in roles)
    yield Work("write the artifact", written / disk, stated)


def _kind(scheme: Scheme) -> str:
    return scheme.format if isinstance(scheme, BitsAndBytesScheme) else scheme.backend
