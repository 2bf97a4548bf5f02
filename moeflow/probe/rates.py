"""All that is measured of a machine, value by value with its source and spread.

What is not essential does not stop the rest: a copy kernel that cannot run, or a bus that the driver keeps to itself,
is left out with a remark. Remarks and sources go into a file that is shared, so no error's text gets into them beyond
what names no path. It chooses no hardware and keeps no file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moeflow.errors import DeviceError
from moeflow.probe.measurement import Measurement
from moeflow.probe.nvml import read_bus
from moeflow.progress import Progress
from moeflow.schema import BusState, Disk, Gpu, Link, LinkPoint, Pcie

__all__ = ["SIZES", "Rates", "measured_rates"]

SIZES = tuple(1 << n for n in range(16, 29, 2))
"""Bytes of the copies that the link is measured with: 64 KiB to 256 MiB."""

RATE_STEP = 10_000_000  # bytes a second; finer digits differ from run to run
PROBE = "measured, moeflow probe"


@dataclass
class Rates:
    """Rates of a machine, with where they come from."""

    link: Link
    gpu_memory: int | None = None
    cpu_memory: int | None = None
    disk: Disk | None = None
    sources: dict[str, str] = field(default_factory=dict)
    """By the names of `HardwareProfile.values`."""
    spreads: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    """What was left out, for people."""
    locked: int = 0
    """Bytes that the GPU's driver locked at once."""

    def note(self, value: str, found: Measurement, how: str) -> int:
        """Record source and spread of `value`; returns its rate, rounded."""
        self.sources[value] = f"{PROBE}, {how}"
        self.spreads[value] = _spread(found)
        return _rounded(found)


def measured_rates(
    gpu: Gpu | None, pcie: Pcie | None, buffer: int, directory: Path | None, blob: int | None, progress: Progress
) -> Rates:
    """Measure link, memories and disk.

    Args:
        gpu: the one that torch uses; None: the link is a copy within host memory.
        pcie: its bus at most, where the driver tells it.
        buffer: bytes of the largest copy.
        directory: its disk is measured by a temporary file; None leaves disk out.
        blob: bytes of an expert of the artifact in `directory`; None: there is none, and a common size is taken.
        progress: told of each measurement.

    Raises:
        DeviceError: the GPU does not answer, or too little of its memory is free.
        StorageError: `directory` cannot be written.
    """
    from moeflow.probe import bandwidth

    rates = _link(gpu, pcie, buffer, progress)
    if gpu:
        how = f"a copy of {buffer >> 20} MiB within it, bytes read and bytes written"
        rates.gpu_memory = rates.note("gpu.memory_bandwidth", bandwidth.device_rate(buffer, progress), how)
    how = f"a sum over {2 * buffer >> 20} MiB by all of torch's threads"
    rates.cpu_memory = rates.note("cpu.memory_bandwidth", bandwidth.read_rate(buffer, progress), how)
    if directory:
        _disk(rates, directory, blob, progress)
    return rates


def _link(gpu: Gpu | None, pcie: Pcie | None, buffer: int, progress: Progress) -> Rates:
    from moeflow.probe import bandwidth

    sizes = [size for size in SIZES if size < buffer] + [buffer]
    if not gpu:
        found = bandwidth.copy_rates(sizes, progress)
        return _with_points(sizes, found, None, "copies within host memory by one thread of ours")
    states: list[BusState | None] = []
    with read_bus(gpu.name) as now:
        found = bandwidth.link_rates(sizes, progress, under_load=lambda: states.append(now()))
    remarks, kernel = [], None
    try:
        kernel = bandwidth.kernel_rates(sizes, progress)
    except DeviceError as error:
        remarks.append(f"the copy kernel is not measured: {str(error).partition(':')[0]}")
    rates = _with_points(sizes, found, kernel, "page-locked copies to the GPU by the copy engine")
    if pcie and rates.link.host_to_device > pcie.peak:  # another way to the device, or a virtual machine's fiction
        remarks.append(f"the bus is left out: copies are faster than PCIe {pcie.generation}.0 x{pcie.lanes}")
        pcie = None
    rates.link = rates.link.model_copy(update={"pcie": pcie, "under_load": states[0]})
    rates.sources |= {
        "link.pcie": "measured, as the driver reports what both ends have at most",
        "link.under_load": "measured, as the driver reports it while copies are under way",
    }
    rates.remarks, rates.locked = remarks, buffer if kernel else 0
    return rates


def _with_points(sizes: list[int], engine: list[Measurement], kernel: list[Measurement] | None, how: str) -> Rates:
    beside: list[Measurement | None] = [*kernel] if kernel else [None] * len(sizes)
    points = tuple(
        LinkPoint(
            nbytes=nbytes,
            engine=_rounded(mine),
            engine_spread=_spread(mine),
            kernel=_rounded(theirs) if theirs else None,
            kernel_spread=_spread(theirs) if theirs else None,
        )
        for nbytes, mine, theirs in zip(sizes, engine, beside, strict=True)
    )
    rates = Rates(Link(host_to_device=points[-1].engine, by_size=points))
    rates.note("link.host_to_device", engine[-1], f"{how}, {sizes[-1] >> 20} MiB each")
    both = ", and by the copy kernel from registered memory" if kernel else ""
    rates.sources["link.by_size"] = f"{PROBE}, {how}{both}"
    return rates


def _disk(rates: Rates, directory: Path, blob: int | None, progress: Progress) -> None:
    from moeflow.probe import disk

    found = disk.disk_rates(directory, progress, disk.LARGEST, blob or disk.BLOB)
    rates.disk = Disk(
        read=rates.note("disk.read", found.sequential, f"{found.how}, {disk.CHUNK >> 20} MiB each, one at a time"),
        random_read=rates.note("disk.random_read", found.random, f"{found.how}, one at a time"),
        blob=found.blob,
    )
    size = (
        "derived, the artifact's largest expert in whole pages" if blob else "assumed, about an expert of a common size"
    )
    rates.sources["disk.blob"] = size


def _rounded(found: Measurement) -> int:
    return max(1, round(found.rate / RATE_STEP)) * RATE_STEP


def _spread(found: Measurement) -> float:
    return round(found.spread, 3)
