"""The probe: this machine as a hardware profile, facts and measured rates, in about three seconds.

A GPU counts if both the driver and torch have it, since moeflow runs on what torch can use. torch is imported
when a rate is measured, not before. Nothing in the result names the machine, so that it can be shared.
"""

from __future__ import annotations

import re
from pathlib import Path

from moeflow.errors import UsageError
from moeflow.probe.devices import find_cpu, find_gpu, find_memory
from moeflow.progress import Progress, silent
from moeflow.schema import Disk, Gpu, HardwareProfile, Link

__all__ = ["probe"]

NAME = r"[a-z0-9][a-z0-9._-]*"  # the schema's rule, checked before three seconds of measuring
RATE_STEP = 10_000_000  # bytes a second; finer digits differ from run to run


def probe(name: str = "this-machine", progress: Progress = silent, directory: Path | None = None) -> HardwareProfile:
    """Describe and measure this machine.

    Args:
        name: of the profile.
        progress: told of each measurement.
        directory: where artifacts are to lie; its disk is measured by a temporary file. None leaves disk out.

    Raises:
        UsageError: `name` cannot be a hardware profile's.
        DeviceError: there is a GPU, but it or its driver does not answer.
        StorageError: `directory` cannot be written.
    """
    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"{name!r} cannot name a hardware profile: use lower-case letters, digits, '.', '_' and '-', "
            "and begin with a letter or digit"
        )
    from moeflow.probe import bandwidth
    from moeflow.probe.disk import disk_rate

    gpu, remark = _usable_gpu()
    cpu, memory = find_cpu(), find_memory()
    buffer = min(bandwidth.BUFFER, memory >> 25 << 20)  # at most a 32nd of memory, in whole MiB
    if gpu:
        link = bandwidth.link_rate(buffer, progress)
        gpu = gpu.model_copy(update={"memory_bandwidth": _rounded(bandwidth.device_rate(buffer, progress))})
    else:
        link = bandwidth.copy_rate(buffer, progress)
    cpu = cpu.model_copy(update={"memory_bandwidth": _rounded(bandwidth.read_rate(buffer, progress))})
    profile = HardwareProfile(
        name=name,
        description="; ".join(part for part in (_summary(gpu, cpu.cores), remark) if part),
        origin="measured",
        gpu=gpu,
        cpu=cpu,
        ram=memory,
        link=Link(host_to_device=_rounded(link)),
        disk=Disk(read=_rounded(disk_rate(directory, progress))) if directory else None,
    )
    return profile.model_copy(update={"sources": {value: _source(value) for value in profile.values()}})


def _source(value: str) -> str:
    """What a shared file says of each value; ours are all from the machine itself."""
    timed = value.endswith((".memory_bandwidth", ".host_to_device", ".read"))
    return "measured, moeflow probe" if timed else "measured, as the driver or the operating system reports it"


def _usable_gpu() -> tuple[Gpu | None, str]:
    """The GPU that torch uses by default, or none and the reason if the driver has one all the same."""
    from moeflow.probe import bandwidth

    seen = find_gpu()
    if seen is None:
        return None, ""
    named = bandwidth.cuda_device_name()
    if named is None:
        return None, f"{seen.name} is not used: {bandwidth.no_cuda_reason()}"
    return find_gpu(named), ""


def _summary(gpu: Gpu | None, cores: int) -> str:
    count = f"{cores} CPU core{'s' if cores > 1 else ''}"
    if gpu:
        return f"{gpu.name}, {count}; link: pinned copies to the GPU"
    return f"No GPU, {count}; link: copies within host memory"


def _rounded(rate: float) -> int:
    return max(1, round(rate / RATE_STEP)) * RATE_STEP
