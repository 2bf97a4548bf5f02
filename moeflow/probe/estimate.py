"""The link's rate without measuring: from what the bus can carry, or from the nearest machine in hardware/.

A profile needs that one rate. No other is guessed, and the source of this one says what it is.
"""

from __future__ import annotations

from moeflow.errors import DeviceError
from moeflow.probe.match import known_hardware
from moeflow.probe.nearest import Sought, nearest
from moeflow.probe.rates import RATE_STEP, Rates
from moeflow.schema import Cpu, Gpu, Link, Pcie

__all__ = ["estimated_rates"]

SHARE = 0.8  # of the bus's peak, as in the files of hardware/; on an H100 copies reached 0.87 (docs/benchmarks.md)


def estimated_rates(gpu: Gpu | None, pcie: Pcie | None, cpu: Cpu, memory: int) -> Rates:
    """The link alone.

    Raises:
        DeviceError: the bus is not known and no file of hardware/ is like this machine.
        DocumentError: a file of hardware/ breaks a rule.
    """
    if pcie:
        rate = int(SHARE * pcie.peak / RATE_STEP) * RATE_STEP
        bus = f"PCIe {pcie.generation}.0 x{pcie.lanes}"
        sources = {
            "link.host_to_device": f"derived, {SHARE} of the peak of {bus}, {pcie.peak / 1e9:.1f} GB/s; not measured",
            "link.pcie": "measured, as the driver reports what both ends have at most",
        }
        return Rates(Link(host_to_device=rate, pcie=pcie), sources=sources)
    found = nearest(_sought(gpu, cpu, memory), known_hardware().values())
    if not found:
        raise DeviceError(
            "neither the bus is known nor a machine in hardware/ like this one, so nothing can stand for the link's "
            "rate: probe without --quick"
        )
    known = found[0].profile
    source = f"assumed, as of {known.name} in hardware/, the nearest machine there; not measured"
    return Rates(Link(host_to_device=known.link.host_to_device), sources={"link.host_to_device": source})


def _sought(gpu: Gpu | None, cpu: Cpu, memory: int) -> Sought:
    if gpu is None:
        return Sought(cores=cpu.cores, ram=memory)
    return Sought(gpu.name, gpu.compute_capability, gpu.memory, cores=cpu.cores, ram=memory)
