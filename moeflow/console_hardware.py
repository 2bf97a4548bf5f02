"""What people see of machines in a terminal: one with its rates, many in a table, the nearest and what differs.

It knows hardware profiles and decides nothing; tables are `moeflow.console`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from moeflow.console import err, fact_table, grid, out
from moeflow.schema import BusState, CpuKernels, HardwareProfile, Pcie
from moeflow.schema.units import format_rate, format_size

if TYPE_CHECKING:
    from moeflow.probe.nearest import Finding

__all__ = [
    "show_cpu_kernels", "show_findings", "show_hardware", "show_kernels", "show_link", "show_machines", "show_now",
    "show_sources",
]  # fmt: skip


def show_hardware(hardware: HardwareProfile, to: Console = err) -> None:
    """A machine's facts and rates."""
    gpu, cpu, link, disk = hardware.gpu, hardware.cpu, hardware.link, hardware.disk
    rows = [("GPU", f"{gpu.name}, {format_size(gpu.memory)}, compute {gpu.compute_capability}" if gpu else "none")]
    if gpu and gpu.memory_bandwidth:
        rows.append(("GPU memory", _rate(hardware, "gpu.memory_bandwidth")))
    if link.pcie:
        loaded = f"; {_bus(link.under_load)} while copying" if link.under_load else ""
        rows.append(("bus", f"{_bus(link.pcie)} at most{loaded}"))
    sets = f"; {', '.join(cpu.instruction_sets)}" if cpu.instruction_sets else ""
    locked = f", {format_size(hardware.ram_lockable)} may be page-locked" if hardware.ram_lockable is not None else ""
    rate = f", {_rate(hardware, 'cpu.memory_bandwidth')}" if cpu.memory_bandwidth else ""
    rows += [
        ("CPU", f"{cpu.name or 'unnamed'}, {cpu.cores} cores{sets}"),
        ("RAM", format_size(hardware.ram) + locked + rate),
        ("link", f"{_rate(hardware, 'link.host_to_device')} host to {'device' if gpu else 'slots (memory copy)'}"),
    ]
    if hardware.source("link.host_to_device").startswith(("derived", "assumed")):
        rows.append(("", hardware.source("link.host_to_device")))
    if disk:
        rows.append(("disk", f"{_rate(hardware, 'disk.read')} read"))
        if disk.blob:
            rows.append(("", f"{_rate(hardware, 'disk.random_read')} in random reads of {format_size(disk.blob)}"))
    fact_table(to, f"{hardware.name} ({hardware.origin})", rows)


def show_link(hardware: HardwareProfile, to: Console = err) -> None:
    """The link by the size of a copy; nothing where that was not measured."""
    if not hardware.link.by_size:
        return
    engine, *kernel = ("copy engine", "copy kernel") if hardware.gpu else ("memory copy",)
    rows = []
    for point in hardware.link.by_size:
        cells = [(point.engine, point.engine_spread), (point.kernel, point.kernel_spread)][: 1 + len(kernel)]
        rows.append((format_size(point.nbytes), *(_spread_rate(*cell) for cell in cells)))
    grid(to, "link by size of a copy", ("size", engine, *kernel), rows)


def show_kernels(hardware: HardwareProfile, to: Console = err) -> None:
    """The engine's own kernels; nothing where they were not measured."""
    gpu = hardware.gpu
    if gpu is None or gpu.kernels is None or not gpu.memory_bandwidth:
        return
    rows = [
        (
            name,
            f"{product.latency * 1e6:.1f} us",
            format_rate(product.rate),
            f"{product.rate / gpu.memory_bandwidth:.2f}",
        )
        for name, product in gpu.kernels.products.items()
    ]
    rows.append(("layer, beside products", f"{gpu.kernels.layer * 1e6:.1f} us", "", ""))
    grid(to, "kernels", ("format", "latency", "rate", "of memory"), rows)


def show_cpu_kernels(hardware: HardwareProfile, to: Console = err) -> None:
    """The CPU's kernels, alone and beside the link; nothing where they were not measured."""
    kernels, memory = hardware.cpu.kernels, hardware.cpu.memory_bandwidth
    if kernels is None:
        return
    rows = [
        (name, format_rate(rate), f"{rate / memory:.2f}" if memory else "") for name, rate in kernels.products.items()
    ]
    if kernels.joint:
        rows.append(("beside copies", format_rate(kernels.joint.cpu), ""))
        rows.append(("copies beside them", format_rate(kernels.joint.link), ""))
    threads = f"{kernels.threads} thread{'s' if kernels.threads > 1 else ''}"
    grid(to, f"CPU kernels: {threads}, {kernels.level}", ("format", "rate", "of memory"), rows)


def _cpu_kernels(kernels: CpuKernels) -> str:
    """In one line."""
    said = [f"{name} {format_rate(rate)}" for name, rate in kernels.products.items()]
    if kernels.joint:
        said.append(f"beside copies {format_rate(kernels.joint.cpu)} and {format_rate(kernels.joint.link)}")
    return f"{kernels.level}, {kernels.threads} threads: {', '.join(said)}"


def show_now(rows: Iterable[tuple[str, str]], to: Console = out) -> None:
    """What a machine has at this moment."""
    fact_table(to, "now", rows)


def _rate(hardware: HardwareProfile, value: str) -> str:
    return _spread_rate(hardware.values()[value], hardware.spreads.get(value))


def _spread_rate(rate: int | None, spread: float | None) -> str:
    if rate is None:
        return "not measured"
    return format_rate(rate) + (f" (spread {spread:.1%})" if spread is not None else "")


def _bus(bus: Pcie | BusState) -> str:
    return f"PCIe {bus.generation}.0 x{bus.lanes}"


def show_machines(profiles: Iterable[HardwareProfile], to: Console = out) -> None:
    """Machines, one a line."""
    rows = [
        (
            profile.name,
            _short_name(profile.gpu.name) if profile.gpu else "none",
            format_size(profile.gpu.memory) if profile.gpu else "",
            format_rate(profile.gpu.memory_bandwidth) if profile.gpu and profile.gpu.memory_bandwidth else "",
            format_rate(profile.link.host_to_device),
            profile.origin,
        )
        for profile in profiles
    ]
    grid(to, "machines in hardware/", ("name", "GPU", "memory", "its rate", "link", "rates are"), rows)


def _short_name(gpu: str) -> str:
    return gpu.removeprefix("NVIDIA ").removeprefix("GeForce ").removesuffix(" GPU")


def show_sources(profile: HardwareProfile, to: Console = out) -> None:
    """A machine's values, each with where it comes from."""
    written: dict[str, Callable[[Any], str]] = {
        "gpu.memory": format_size,
        "gpu.memory_bandwidth": format_rate,
        "cpu.memory_bandwidth": format_rate,
        "ram": format_size,
        "link.host_to_device": format_rate,
        "ram_lockable": format_size,
        "cpu.instruction_sets": ", ".join,
        "cpu.kernels": _cpu_kernels,
        "link.pcie": _bus,
        "link.under_load": _bus,
        "link.by_size": lambda points: ", ".join(f"{format_size(p.nbytes)}: {format_rate(p.engine)}" for p in points),
        "disk.read": format_rate,
        "disk.random_read": format_rate,
        "disk.blob": format_size,
    }
    rows = []
    for name, value in profile.values().items():
        spread = f" (spread {profile.spreads[name]:.1%})" if name in profile.spreads else ""
        rows.append((name, written.get(name, str)(value) + spread, profile.source(name)))
    grid(to, escape(f"{profile.name}: {profile.description}"), ("value", "", "source"), rows)


KINDS = {"same": "the same GPU", "variant": "another version of this GPU", "nearest": "another one, the nearest"}


def show_findings(title: str, findings: Sequence[Finding], to: Console = out) -> None:
    """The nearest machine with what matches and what differs, and the names of those behind it."""
    best, *others = findings
    rows = [
        (KINDS[best.kind], best.profile.name),
        ("same", ", ".join(best.same) or "nothing"),
        ("differs", "\n".join(best.differs) or "nothing"),
        ("not known", ", ".join(best.unknown) or "nothing"),
    ]
    if best.kind != "same" and others:
        rows.append(("then", ", ".join(finding.profile.name for finding in others)))
    fact_table(to, escape(title), rows)
