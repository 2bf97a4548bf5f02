"""The probe: this machine as a hardware profile, facts and measured rates, in some seconds.

A GPU counts if torch can use it, since moeflow runs on what torch can use; the driver tells more of it. torch is
imported when a machine is probed, not before. Nothing in the result names the machine, so that it can be shared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from moeflow import __version__
from moeflow.errors import UsageError
from moeflow.probe.devices import find_cpu, find_lockable, find_memory
from moeflow.probe.nvml import Board, find_board
from moeflow.progress import Progress, silent
from moeflow.schema import Gpu, HardwareProfile, Manifest, Probed

__all__ = ["probe"]

NAME = r"[a-z0-9][a-z0-9._-]*"  # the schema's rule, checked before seconds of measuring
REPORTED = "measured, as the driver or the operating system reports it"


def probe(
    name: str = "this-machine", progress: Progress = silent, directory: Path | None = None, quick: bool = False
) -> HardwareProfile:
    """Describe and measure this machine.

    Args:
        name: of the profile.
        progress: told of each measurement.
        directory: where artifacts are to lie; its disk is measured by a temporary file. None leaves disk out. If an
            artifact lies there, its experts' size is that of random reads.
        quick: measure nothing; the link's rate is what its source says, and the other rates are left out.

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
    used, cpu, memory = _used_gpu(), find_cpu(), find_memory()
    gpu, pcie = used.gpu, used.board.pcie if used.board else None
    if quick:
        from moeflow.probe.estimate import estimated_rates

        rates = estimated_rates(gpu, pcie, cpu, memory)
    else:
        from moeflow.probe.bandwidth import BUFFER
        from moeflow.probe.rates import measured_rates

        buffer = min(BUFFER, memory >> 25 << 20)  # at most a 32nd of memory, in whole MiB
        rates = measured_rates(gpu, pcie, buffer, directory, _blob(directory), progress)
    lockable, how = find_lockable(memory, rates.locked)
    profile = HardwareProfile(
        name=name,
        description="; ".join((_summary(gpu, cpu.cores, quick), *used.remarks, *rates.remarks)),
        origin="derived" if quick else "measured",
        gpu=gpu and gpu.model_copy(update={"memory_bandwidth": rates.gpu_memory}),
        cpu=cpu.model_copy(update={"memory_bandwidth": rates.cpu_memory}),
        ram=memory,
        ram_lockable=lockable,
        link=rates.link,
        disk=rates.disk,
        spreads=rates.spreads,
        probed=_probed(used.board),
    )
    known = {"ram_lockable": how, **used.sources, **rates.sources}
    sources = {value: known.get(value, REPORTED) for value in profile.values()}
    return HardwareProfile.parse(profile.model_copy(update={"sources": sources}).to_dict(), "probe")


@dataclass(frozen=True)
class _Used:
    """The GPU that torch uses by default, if any."""

    gpu: Gpu | None = None
    board: Board | None = None
    remarks: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)


def _used_gpu() -> _Used:
    from moeflow.probe import cuda

    known = cuda.cuda_gpu()
    if known is None:
        seen = find_board()
        return _Used(remarks=(f"{seen.gpu.name} is not used: {cuda.no_cuda_reason()}",) if seen else ())
    board = find_board(known.name, known)
    if board is None:
        values = ("gpu.name", "gpu.memory", "gpu.compute_capability")
        remark = "the driver's own library (NVML) does not list this GPU"
        return _Used(known, None, (remark,), dict.fromkeys(values, "measured, as CUDA reports it"))
    return _Used(board.gpu, board, board.remarks)


def _blob(directory: Path | None) -> int | None:
    """Bytes of the largest expert of the artifact in `directory`; None where none lies there."""
    manifest = directory / "manifest.json" if directory else None
    if manifest is None or not manifest.is_file():
        return None
    return max(layout.nbytes for layout in Manifest.load(manifest).layouts)


def _summary(gpu: Gpu | None, cores: int, quick: bool) -> str:
    count = f"{cores} CPU core{'s' if cores > 1 else ''}"
    link = "copies within host memory" if gpu is None else "page-locked copies to the GPU"
    return f"{gpu.name if gpu else 'No GPU'}, {count}; " + ("nothing was measured" if quick else f"link: {link}")


def _probed(board: Board | None) -> Probed:
    import torch

    return Probed(
        date=date.today(),
        moeflow=__version__,
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        driver=board.driver if board else None,
    )
