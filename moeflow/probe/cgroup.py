"""What a container or a job manager lets this process use, where that is less than the machine has.

Neither psutil nor the number of CPUs shows it: a process that goes past the memory limit is killed, and one
with more threads than its CPU quota is stopped for part of every period. Both hierarchies (v1, v2) are read,
since machines mount either or both; a file that is missing is no limit. It sets no limits.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["memory_limit", "cpu_limit"]

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that this process and its group may use; None without a limit."""
    texts = [
        _read(group / name)
        for group in _groups("memory", root, membership)
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    # v1 writes "no limit" as a number near 2^63, which every machine's memory is below
    return min((int(text) for text in texts if text.isdigit()), default=None)


def cpu_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """CPUs' worth of time that this process and its group get; None without a quota."""
    limits = []
    for group in _groups("cpu", root, membership):
        fields = _read(group / "cpu.max").split()
        if not fields:
            fields = [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
        if len(fields) == 2 and all(f.isdigit() for f in fields):  # not "max", not -1
            limits.append(int(fields[0]) / int(fields[1]))
    return min(limits, default=None)


def _groups(controller: str, root: Path, membership: Path) -> list[Path]:
    """The group of this process and all above it: each may set a limit, the lowest holds."""
    groups: list[Path] = []
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            trees = [root, root / "unified"]
        elif controller in controllers.split(","):
            trees = [root / controller]
        else:
            continue
        own = Path(path.lstrip("/"))
        # inside a container `path` may be the host's name of the group and not exist here; the tree's root,
        # the last of `parents`, is then the container's group
        groups += [tree / level for tree in trees for level in (own, *own.parents)]
    return groups


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
