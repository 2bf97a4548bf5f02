"""How a plan's misses are split between link and CPU, and what another split would bring: figures for `explain`.

What a step really does it adapts as it runs; these are the cost model's figures. It knows no text but the names of
changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moeflow.planning.cost import Running, predict
from moeflow.planning.cpu_rates import CpuRates, computes, usual_threads
from moeflow.planning.rates import Rates
from moeflow.planning.sharing import shared
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import CpuKernels, HardwareProfile, Plan, PlannedCpu, Prediction

__all__ = ["Split", "faster_cpu", "faster_joint_link", "other_splits", "split_of"]


@dataclass(frozen=True)
class Split:
    """Bytes that a token lacks on the device, by who takes them, and how fast each is while both do."""

    link_nbytes: int
    cpu_nbytes: int
    link_rate: float | None = None
    """Bytes a second; None where the machine is not at hand, or nothing travels."""
    cpu_rate: float | None = None


def split_of(plan: Plan, running: Running, sizes: ModelSizes | None, hardware: HardwareProfile | None) -> Split | None:
    """Of a plan with a prediction; None where the CPU has no part beside the device."""
    found = plan.prediction
    if found is None or plan.cpu is None or plan.execution == "host":
        return None
    split = Split(found.missed_bytes, found.computed_bytes)
    rates = Rates.of(hardware) if hardware else None
    cpu = running.beside(hardware, rates) if hardware and rates else None
    if cpu is None or sizes is None:
        return split
    nbytes = sum(layer.mean_nbytes for layer in sizes.layers)
    if plan.cpu.fixed:
        return replace(split, cpu_rate=nbytes / sum(y.mean_nbytes / cpu.alone(y.format) for y in sizes.layers))
    products, copies = zip(*(cpu.beside(layer.format) for layer in sizes.layers), strict=True)
    seconds = [y.mean_nbytes / (p + c) for y, p, c in zip(sizes.layers, products, copies, strict=True)]
    by_cpu, by_link = (sum(r * s for r, s in zip(own, seconds, strict=True)) for own in (products, copies))
    return replace(split, link_rate=by_link / sum(seconds), cpu_rate=by_cpu / sum(seconds))


def other_splits(
    plan: Plan, sizes: ModelSizes, hardware: HardwareProfile, running: Running
) -> Iterator[tuple[str, Prediction | None]]:
    """What is predicted with the CPU or without it, and with more threads; nothing where its kernels have no part."""
    if plan.strategy == "naive" or not all(map(computes, sizes.layers)):
        return
    usual = usual_threads(hardware)
    if plan.device == "cpu":
        if plan.cpu is None and _knows(sizes, hardware):
            part = PlannedCpu(threads=usual, share=1.0, fixed=True, activations="fixed16")
            yield "the CPU's own kernels (cpu.experts: on)", predict(sizes, hardware, replace(running, cpu=part))
    elif plan.execution == "device":
        if plan.cpu is None or plan.cpu.fixed:
            part = shared(sizes, hardware, plan.cpu.threads if plan.cpu else usual)
            yield "misses shared with the CPU (cpu.experts: on)", predict(sizes, hardware, replace(running, cpu=part))
        if plan.cpu is not None:
            yield "misses by the link alone (cpu.experts: off)", predict(sizes, hardware, replace(running, cpu=None))
    if plan.cpu is not None and plan.cpu.threads < usual:
        part = plan.cpu.model_copy(update={"threads": usual})
        yield f"{usual} threads on the CPU (cpu.threads)", predict(sizes, hardware, replace(running, cpu=part))


def _knows(sizes: ModelSizes, hardware: HardwareProfile) -> bool:
    return CpuRates.of(hardware, 1, 0.0).knows(layer.format for layer in sizes.layers)


def faster_cpu(hardware: HardwareProfile) -> HardwareProfile:
    """With twice the rate of host memory, which bounds the CPU's products; the link's rate stays."""
    cpu = hardware.cpu
    kernels = cpu.kernels and cpu.kernels.model_copy(
        update={
            "products": {name: 2 * rate for name, rate in cpu.kernels.products.items()},
            **_joint(cpu.kernels, 2, 1),
        }
    )
    memory = cpu.memory_bandwidth and 2 * cpu.memory_bandwidth
    return hardware.model_copy(update={"cpu": cpu.model_copy(update={"memory_bandwidth": memory, "kernels": kernels})})


def faster_joint_link(hardware: HardwareProfile) -> HardwareProfile:
    """With twice the link's rate beside the CPU, where that was measured."""
    cpu = hardware.cpu
    kernels = cpu.kernels and cpu.kernels.model_copy(update=_joint(cpu.kernels, 1, 2))
    return hardware.model_copy(update={"cpu": cpu.model_copy(update={"kernels": kernels})})


def _joint(kernels: CpuKernels, cpu: int, link: int) -> dict[str, object]:
    joint = kernels.joint
    return {"joint": joint and joint.model_copy(update={"cpu": cpu * joint.cpu, "link": link * joint.link})}
