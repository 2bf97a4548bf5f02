"""What is found of processor and memory, with groups, limits and files that are made up."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from moeflow.probe import devices
from moeflow.probe.cgroup import cpu_limit, memory_limit
from moeflow.probe.devices import find_cpu, find_lockable, find_memory

GIB = 1 << 30


def group(root: Path, path: str, **files: str) -> None:
    directory = root / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text + "\n")


def member(root: Path, text: str) -> Path:
    path = root / "membership"
    path.write_text(text)
    return path


def test_no_group_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path, tmp_path / "missing") is None
    assert cpu_limit(tmp_path, tmp_path / "missing") is None
    membership = member(tmp_path, "0::/a\n")
    group(tmp_path, "a", memory__max="max", cpu__max="max 100000")
    assert memory_limit(tmp_path, membership) is None
    assert cpu_limit(tmp_path, membership) is None


def test_version_2_takes_the_lowest_from_own_group_to_root(tmp_path: Path) -> None:
    membership = member(tmp_path, "0::/job/step\n")
    group(tmp_path, "job/step", memory__max="9000", cpu__max="max 100000")
    group(tmp_path, "job", memory__max="5000", cpu__max="150000 100000")
    group(tmp_path, "other", memory__max="1", cpu__max="1 100000")
    assert memory_limit(tmp_path, membership) == 5000
    assert cpu_limit(tmp_path, membership) == 1.5
    group(tmp_path, "", memory__max="4000", cpu__max="100000 200000")
    assert memory_limit(tmp_path, membership) == 4000
    assert cpu_limit(tmp_path, membership) == 0.5


def test_version_1_and_a_path_from_outside_the_container(tmp_path: Path) -> None:
    membership = member(tmp_path, "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    group(tmp_path, "memory", memory__limit_in_bytes="7000")
    group(tmp_path, "cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert memory_limit(tmp_path, membership) == 7000
    assert cpu_limit(tmp_path, membership) == 3.0
    group(tmp_path, "cpu", cpu__cfs_quota_us="-1")
    assert cpu_limit(tmp_path, membership) is None


def test_memory_is_the_lower_of_machine_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB + 12345))
    monkeypatch.setattr(devices, "memory_limit", lambda: None)
    assert find_memory() == 16 * GIB
    monkeypatch.setattr(devices, "memory_limit", lambda: 2**63 - 4096)
    assert find_memory() == 16 * GIB
    monkeypatch.setattr(devices, "memory_limit", lambda: 3 * GIB + 5)
    assert find_memory() == 3 * GIB


def topology(root: Path, siblings: dict[int, str]) -> Path:
    for number, text in siblings.items():
        directory = root / f"cpu{number}/topology"
        directory.mkdir(parents=True)
        (directory / "thread_siblings_list").write_text(text)
    return root


def test_cores_are_physical_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}
    monkeypatch.setattr(devices, "TOPOLOGY", topology(tmp_path, pairs))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5})
    quota: list[float | None] = [None]
    monkeypatch.setattr(devices, "cpu_limit", lambda: quota[0])
    assert find_cpu().cores == 3  # 0 with 4, 1 with 5, and 2
    quota[0] = 2.5
    assert find_cpu().cores == 2
    quota[0] = 0.5
    assert find_cpu().cores == 1
    quota[0] = 64.0
    assert find_cpu().cores == 3


def test_without_a_topology_every_cpu_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 9})
    monkeypatch.setattr(devices, "cpu_limit", lambda: None)
    assert find_cpu().cores == 3


def test_the_name_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "CPUINFO", cpuinfo)
    assert find_cpu().name == ""
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some   CPU @ 2.0GHz\n\nmodel name\t: Second\n")
    assert find_cpu().name == "Some CPU @ 2.0GHz"
    cpuinfo.write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert find_cpu().name == ""


@pytest.mark.parametrize(
    ("field", "names", "found"),
    [
        ("flags", "fpu avx2 hypervisor avx512f avx512_vnni amx_int8", ("avx2", "avx512f", "avx512_vnni", "amx_int8")),
        ("Features", "fp asimd aes asimddp i8mm sve2", ("asimd", "asimddp", "i8mm", "sve2")),
        ("flags", "fpu vme", ()),
    ],
)  # fmt: skip
def test_instruction_sets_are_those_that_kernels_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, names: str, found: tuple[str, ...]
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvmx flags\t: avx512_fp16\n{field}\t\t: {names}\n\nflags\t: sme\n")
    monkeypatch.setattr(devices, "CPUINFO", cpuinfo)
    assert find_cpu().instruction_sets == found


def lockable(monkeypatch: pytest.MonkeyPatch, status: Path, limit: int, locked: int = 0) -> tuple[int, str]:
    monkeypatch.setattr(devices, "STATUS", status)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, -1) if kind == resource.RLIMIT_MEMLOCK else (0, 0))
    return find_lockable(16 * GIB, locked)


def test_the_limit_of_locked_memory_holds_only_where_it_is_the_lower_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.write_text("CapInh:\t0000000000000000\nCapEff:\t00000000a80425fb\n")
    below, how = lockable(monkeypatch, status, 8 << 20)
    assert below == 8 << 20
    assert how.startswith("derived, the limit of locked memory")
    assert lockable(monkeypatch, status, 20 * GIB)[0] == 16 * GIB
    assert lockable(monkeypatch, status, resource.RLIM_INFINITY)[0] == 16 * GIB
    assert lockable(monkeypatch, tmp_path / "absent", 8 << 20)[0] == 8 << 20


def test_who_may_lock_all_or_has_locked_more_is_not_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("CapEff:\t000001ffffffffff\n")
    assert lockable(monkeypatch, status, 8 << 20)[0] == 16 * GIB
    status.write_text("CapEff:\t0000000000000000\n")
    all_of_it, how = lockable(monkeypatch, status, 8 << 20, locked=256 << 20)
    assert all_of_it == 16 * GIB
    assert how == "derived, all of ram: the driver locked 256 MiB though ulimit -l is 8 MiB"
