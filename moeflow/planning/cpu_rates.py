"""What the CPU's own kernels take, alone and while the link reads the same memory: the cost model's third resource.

Rates are those that `moeflow probe` measured. Where the machine's file has none, a share of host memory's rate stands
for them, and shares of each rate alone for both at once; whoever predicts by them says so. It decides nothing: who
computes what is `moeflow.planning.sharing`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from moeflow.planning.sizes import LayerSize
from moeflow.schema import Cpu, HardwareProfile

__all__ = ["FORMATS", "HANDSHAKE", "CpuRates", "computes", "usual_threads"]

# Of an exchange, besides its bytes: until each side sees what the other has done, and threads begin and end together.
# A layer with a miss has two. Fitted to Mixtral's and Qwen3's rows on an H100's machine (docs/cost-model.md).
HANDSHAKE = 40e-6
UNMEASURED = 0.7  # of host memory's rate, for products of a format that nobody measured
# Of each rate alone, while both read host memory: on an H100's machine 15 threads had 69 of 83 GB/s, copies 43 of 49.
CPU_BESIDE, LINK_BESIDE = 0.83, 0.88
META = " meta8"
FORMATS = frozenset({*(f"{bits}-bit{meta}" for bits in (2, 3, 4, 8) for meta in ("", META)), "nf4", "int8"})
"""That the CPU's kernels multiply, as `rates.format_of` names them."""


def computes(layer: LayerSize) -> bool:
    """Whether the kernels multiply a layer's experts: packed, and all of one layout."""
    return layer.format in FORMATS and not layer.blobs


def usual_threads(hardware: HardwareProfile) -> int:
    """That multiply if nobody says how many: all cores, beside a GPU all but the host's."""
    return max(1, hardware.cpu.cores - 1) if hardware.gpu else hardware.cpu.cores


@dataclass(frozen=True)
class CpuRates:
    """So many threads of a machine's CPU beside its link, in bytes a second."""

    cpu: Cpu
    threads: int
    usual: int
    """Threads that unmeasured rates are of."""
    link: float
    """Of a kernel's copies, alone."""

    @classmethod
    def of(cls, hardware: HardwareProfile, threads: int, link: float) -> Self:
        """Of a machine."""
        return cls(hardware.cpu, threads, usual_threads(hardware), link)

    def knows(self, formats: Iterable[str]) -> bool:
        """Whether products of all these were measured."""
        return all(self._measured(name) for name in formats)

    def known(self, formats: Iterable[str]) -> bool:
        """Whether there is a rate for all these, measured or assumed."""
        return self.cpu.memory_bandwidth is not None or self.knows(formats)

    def alone(self, name: str) -> float:
        """Products with weights of a format; in proportion to threads, up to host memory's rate."""
        memory = float(self.cpu.memory_bandwidth or 0)
        measured = self._measured(name)
        if measured and self.cpu.kernels:
            return min(measured * self.threads / self.cpu.kernels.threads, max(measured, memory))
        return UNMEASURED * memory * min(1.0, self.threads / self.usual)

    def beside(self, name: str) -> tuple[float, float]:
        """Products and copies, both at once."""
        joint = self.cpu.kernels.joint if self.cpu.kernels else None
        if joint:
            return min(self.alone(name), float(joint.cpu)), float(joint.link)
        return CPU_BESIDE * self.alone(name), LINK_BESIDE * self.link

    def share(self, name: str) -> float:
        """Of missing bytes, what the CPU computes while the link brings the rest."""
        products, copies = self.beside(name)
        return products / (products + copies)

    def unmeasured(self, formats: Iterable[str]) -> Iterator[str]:
        """What nobody measured of these products on this machine."""
        kernels = self.cpu.kernels
        if missing := sorted(name for name in set(formats) if not self._measured(name)):
            yield f"the CPU's products with {', '.join(missing)} weights, as {UNMEASURED} of host memory's rate"
        elif kernels and kernels.threads != self.threads:
            yield f"the CPU's products by {self.threads} threads, from those measured with {kernels.threads}"

    def assumed(self, formats: Iterable[str], joint: bool) -> Iterator[str]:
        """The same, beside a GPU; `joint` where rates at once count."""
        yield from self.unmeasured(formats)
        if joint and not (self.cpu.kernels and self.cpu.kernels.joint):
            yield "CPU and link at once, as shares of each alone on an H100's machine"
        yield f"handshakes of GPU and CPU, {HANDSHAKE * 1e6:.0f} us each"

    def _measured(self, name: str) -> int | None:
        products = self.cpu.kernels.products if self.cpu.kernels else {}
        return products.get(name) or products.get(name.removesuffix(META))
