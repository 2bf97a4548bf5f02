"""What this machine has: GPU by NVIDIA's driver (pynvml), processor and memory by the operating system.

The driver is asked and not torch, because that takes milliseconds and starts no CUDA context. Nothing that
tells one machine from another of its kind is read into a document: no host, user, serial number or UUID.
How fast things are is measured in `moeflow.probe.bandwidth`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import psutil

from moeflow.errors import DeviceError
from moeflow.probe.cgroup import cpu_limit, memory_limit
from moeflow.schema import Cpu, Gpu

__all__ = ["find_cpu", "find_memory", "find_gpu"]

MIB = 1 << 20
CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")


def find_cpu() -> Cpu:
    """Name, and the physical cores that affinity and cgroup leave to this process; no rate."""
    usable = _physical_cores(os.sched_getaffinity(0), TOPOLOGY)
    quota = cpu_limit()
    if quota is not None:
        usable = min(usable, max(1, int(quota)))
    return Cpu(name=_cpu_name(CPUINFO), cores=usable)


def _physical_cores(logical: set[int], topology: Path) -> int:
    """Cores behind these logical CPUs: two threads of one core name the same siblings."""
    try:
        return len({(topology / f"cpu{n}/topology/thread_siblings_list").read_text() for n in logical})
    except OSError:
        return len(logical)


def _cpu_name(cpuinfo: Path) -> str:
    """The `model name` of the first processor; empty where there is none, as on ARM."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return " ".join(found[1].split()) if found else ""


def find_memory() -> int:
    """Bytes of host memory, or of the cgroup's share of it if that is less, in whole MiB."""
    total = psutil.virtual_memory().total
    return min(total, memory_limit() or total) // MIB * MIB


def find_gpu(named: str | None = None) -> Gpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES shows; None without driver or GPU. No rate.

    Args:
        named: as torch names its first GPU. CUDA numbers GPUs fastest first, the driver by slot; among several
            different ones the name decides.

    Raises:
        DeviceError: the driver is broken, or the GPU is a MIG slice.
    """
    visible = _first_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if visible is None:
        return None
    if "MIG" in f"{visible} {named}":
        raise DeviceError(
            "the GPU is a MIG slice, whose share of memory and bandwidth the probe cannot tell; describe it in a "
            "YAML file as those in hardware/ and name that file as the profile's hardware"
        )
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None
    except pynvml.NVMLError as error:
        raise _broken(error) from error
    try:
        handle = _choose(visible, named)
        return None if handle is None else _describe(handle)
    except pynvml.NVMLError as error:
        raise _broken(error) from error
    finally:
        pynvml.nvmlShutdown()


def _first_visible(setting: str | None) -> int | str | None:
    """What CUDA_VISIBLE_DEVICES names first: a number or (the start of) a UUID; None hides all GPUs."""
    if setting is None:
        return 0
    first = setting.split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return first
    number = re.match(r"\+?\d+", first)  # CUDA takes the digits that it begins with, and stops at what has none
    return int(number[0]) if number else None


def _choose(visible: int | str, named: str | None) -> Any | None:
    import pynvml

    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    if isinstance(visible, str):
        return next((h for h in handles if pynvml.nvmlDeviceGetUUID(h).startswith(visible)), None)
    by_name = [h for h in handles if pynvml.nvmlDeviceGetName(h) == named]
    if by_name:
        return by_name[0]
    return handles[visible] if visible < len(handles) else None


def _describe(handle: Any) -> Gpu:
    import pynvml

    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=pynvml.nvmlDeviceGetName(handle),
        memory=pynvml.nvmlDeviceGetMemoryInfo(handle).total // MIB * MIB,
        compute_capability=f"{major}.{minor}",
    )


def _broken(error: Exception) -> DeviceError:
    return DeviceError(
        f"the NVIDIA driver does not answer: {error}; see whether nvidia-smi works (a new driver needs a restart), "
        "or set CUDA_VISIBLE_DEVICES to nothing to go without the GPU"
    )
