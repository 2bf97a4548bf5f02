"""The CPU's kernels on this machine, for plans and the cost model: what they multiply, alone and beside the link.

Formats are those of `calibration`, in the shape of a model with large experts; smaller ones are bound by the same
memory. Threads are as many as a plan takes. An installation without kernels leaves the profile as it is, with a remark.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import Tensor

from moeflow.artifact.layout import expert_layout
from moeflow.errors import DeviceError
from moeflow.kernels.cpu import best_level
from moeflow.kernels.crew import Crew
from moeflow.planning.cpu_rates import usual_threads
from moeflow.planning.rates import format_of
from moeflow.probe import cpu_kernels
from moeflow.probe.measurement import Measurement
from moeflow.probe.rates import RATE_STEP
from moeflow.progress import Progress, silent
from moeflow.schema import BitsAndBytesScheme, CpuKernels, HardwareProfile, HqqScheme, JointRates, PackedMatrix, Scheme
from moeflow.schema.kernels import Level

__all__ = ["SCHEMES", "SHAPE", "calibrated_cpu"]

SHAPE = (4096, 14336)
"""Hidden and intermediate of the experts whose first product is timed."""
SCHEMES: tuple[Scheme, ...] = (
    HqqScheme(bits=2, group_size=64),
    HqqScheme(bits=3, group_size=64),
    HqqScheme(bits=4, group_size=64),
    HqqScheme(bits=8, group_size=64),
    HqqScheme(bits=2, group_size=16, metadata_bits=8),
    BitsAndBytesScheme(format="nf4"),
    BitsAndBytesScheme(format="int8"),
)
"""Formats that are timed, here and on a GPU."""
LEVELS: tuple[Level, ...] = ("portable", "avx2", "avx512", "vnni")  # as `kernels.cpu` counts them
SHARE = 16  # of host memory: what matrices may take of it


def calibrated_cpu(
    hardware: HardwareProfile, progress: Progress = silent, crew: Callable[[int], Crew] = Crew
) -> HardwareProfile:
    """The profile of this machine with its CPU's kernels measured; without kernels with a remark that says so.

    Args:
        hardware: this machine.
        progress: told of each measurement.
        crew: starts so many threads.
    """
    threads, pool = usual_threads(hardware), min(cpu_kernels.POOL, hardware.ram // SHARE)
    matrices = {format_of(scheme): expert_layout(*SHAPE, scheme, "bfloat16").matrices[0] for scheme in SCHEMES}
    try:
        with contextlib.closing(crew(threads)) as workers:
            memory = cpu_kernels.numbers(pool)
            found = cpu_kernels.product_rates(matrices, workers, memory, progress)
            joint, remark = None, ""
            if hardware.gpu and found:
                joint, remark = _joint(next(iter(found)), matrices, workers, memory, progress)
    except DeviceError as error:
        return _remarked(hardware, f"the CPU's kernels are not measured: {str(error).partition(':')[0]}")
    if not found:
        return _remarked(hardware, "the CPU's kernels are not measured: there is none for any format")
    return _remarked(_with_kernels(hardware, threads, pool, found, joint), remark)


def _joint(
    name: str, matrices: dict[str, PackedMatrix], workers: Crew, memory: Tensor, progress: Progress
) -> tuple[JointRates | None, str]:
    """Rates at once, or why there are none."""
    try:
        rates = cpu_kernels.joint_rates(matrices[name], workers, memory, progress)
    except DeviceError as error:
        return None, f"CPU and link at once are not measured: {str(error).partition(':')[0]}"
    if rates is None:
        return None, "CPU and link at once are not measured: the CPU's products take too long"
    products, link = (_rounded(rate) for rate in rates)
    return JointRates(cpu=products, link=link), ""


def _with_kernels(
    hardware: HardwareProfile, threads: int, pool: int, found: dict[str, Measurement], joint: JointRates | None
) -> HardwareProfile:
    kernels = CpuKernels(
        level=LEVELS[best_level()],
        threads=threads,
        products={name: _rounded(measured.rate) for name, measured in found.items()},
        joint=joint,
    )
    beside = ", and beside the copy kernel" if joint else ""
    how = f"measured, moeflow probe, products over {pool >> 20} MiB by {threads} of the engine's threads{beside}"
    return hardware.model_copy(
        update={
            "cpu": hardware.cpu.model_copy(update={"kernels": kernels}),
            "sources": {**hardware.sources, "cpu.kernels": how},
            "spreads": {**hardware.spreads, "cpu.kernels": max(round(m.spread, 3) for m in found.values())},
        }
    )


def _remarked(hardware: HardwareProfile, remark: str) -> HardwareProfile:
    if not remark:
        return hardware
    return hardware.model_copy(update={"description": f"{hardware.description}; {remark}".removeprefix("; ")})


def _rounded(rate: float) -> int:
    return max(1, round(rate / RATE_STEP)) * RATE_STEP
