"""What the host has, as the operating system counts it: processor, memory, and how much of it may be locked.

A container's limits count, not the machine's own figures. Nothing that tells one machine from another of its kind is
read into a document: no host, user or serial number. The GPU is found in `moeflow.probe.nvml`, and how fast things are
is measured in `moeflow.probe.bandwidth`.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from pathlib import Path

import psutil

from moeflow.probe.cgroup import cpu_limit, memory_limit
from moeflow.schema import Cpu
from moeflow.schema.units import format_size

__all__ = ["find_cpu", "find_lockable", "find_memory"]

MIB = 1 << 20
CPUINFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
CAP_IPC_LOCK = 14
TOPOLOGY = Path("/sys/devices/system/cpu")
# What products of few rows gain by, as /proc/cpuinfo writes it; others are left out.
INSTRUCTION_SETS = (
    "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip


def find_cpu() -> Cpu:
    """Name, instruction sets, and the physical cores that affinity and cgroup leave to this process; no rate."""
    usable = _physical_cores(os.sched_getaffinity(0), TOPOLOGY)
    quota = cpu_limit()
    if quota is not None:
        usable = min(usable, max(1, int(quota)))
    names = _first_processor("flags|Features").split()
    sets = tuple(name for name in INSTRUCTION_SETS if name in names)
    return Cpu(name=_first_processor("model name"), cores=usable, instruction_sets=sets)


def _physical_cores(logical: set[int], topology: Path) -> int:
    """Cores behind these logical CPUs: two threads of one core name the same siblings."""
    try:
        return len({(topology / f"cpu{n}/topology/thread_siblings_list").read_text() for n in logical})
    except OSError:
        return len(logical)


def _first_processor(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none, as for the name on ARM."""
    try:
        found = re.search(rf"^(?:{field})\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return " ".join(found[1].split()) if found else ""


def find_memory() -> int:
    """Bytes of host memory, or of the cgroup's share of it if that is less, in whole MiB."""
    total = psutil.virtual_memory().total
    return min(total, memory_limit() or total) // MIB * MIB


def find_lockable(memory: int, locked: int = 0) -> tuple[int, str]:
    """Bytes of host memory that may be page-locked, and how that is known.

    Args:
        memory: what this process may use, as `find_memory` says.
        locked: bytes that the GPU's driver has already locked at once. More than this process's limit allows shows that
            the driver does not count it.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or limit >= memory or _may_lock_all(STATUS):
        return memory, "derived, all of ram: the limit of locked memory (ulimit -l) is no lower or does not hold"
    if locked > limit:
        return memory, (
            f"derived, all of ram: the driver locked {format_size(locked)} though ulimit -l is {format_size(limit)}"
        )
    return limit, "derived, the limit of locked memory (ulimit -l), which is below ram"


def _may_lock_all(status: Path) -> bool:
    """Whether this process has the capability that the limit of locked memory does not hold for."""
    with contextlib.suppress(OSError):
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
        return bool(found and int(found[1], 16) >> CAP_IPC_LOCK & 1)
    return False
