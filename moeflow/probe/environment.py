"""What a benchmark was run on: hardware as the probe finds it, versions, and the commit of moeflow's checkout.

Like a hardware profile it names no host, user or path, so that results can be shared. What cannot be found out is
None; only a broken driver is an error.
"""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from moeflow import __version__
from moeflow.probe.devices import find_cpu, find_memory
from moeflow.probe.nvml import find_board
from moeflow.schema import Environment

__all__ = ["environment", "commit"]

PACKAGE = Path(__file__).parents[1]


def environment() -> Environment:
    """This machine and these versions, as a benchmark's header.

    Raises:
        DeviceError: there is a GPU that torch uses, but it or its driver does not answer.
    """
    import torch

    named = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    board = find_board(named) if named else None
    gpu = board.gpu if board else None
    cpu = find_cpu()
    return Environment(
        gpu=gpu.name if gpu else named,
        gpu_memory=gpu.memory if gpu else None,
        cpu=cpu.name or platform.machine(),
        cores=cpu.cores,
        ram=find_memory(),
        driver=board.driver if board else None,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        moeflow=__version__,
        commit=commit(PACKAGE),
    )


def commit(package: Path) -> str | None:
    """The commit that `package` is of, `+changes` if tracked files differ from it; None outside its own checkout.

    A package installed into an environment that lies inside some other repository is not of that repository.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.parent.resolve():
        return None
    name = _git(package, "rev-parse", "--short", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{name}+changes" if name and changed else name


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None
    return result.stdout.strip()
