"""The CPU kernels' shared library, compiled from `cpp/` by g++ or clang++.

Standard library only and no import of moeflow: the build hook loads this file by its path, where torch and moeflow are
not installed. It neither decides whether the library is wanted nor loads it: that is `scripts/build_hook.py` and
`library.py`.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["build"]

HERE = Path(__file__).parent
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off"]
FLAGS += ["-static-libstdc++", "-static-libgcc"]  # only the C library is asked of a machine


def build(target: Path, compiler: str | None = None) -> None:
    """Compile all units into `target`, which is replaced as a whole: a process that has the old file open keeps it.

    Args:
        target: the shared library's file.
        compiler: a command such as `clang++` or `ccache g++`; None for the first of g++ and clang++ that is there.

    Raises:
        RuntimeError: no compiler, or its first complaint.
    """
    command = shlex.split(compiler or next(filter(shutil.which, ("g++", "clang++")), ""))
    if not command:
        raise RuntimeError("no C++ compiler was found (g++ or clang++)")
    units = sorted((HERE / "cpp").glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / target.name
        try:
            done = subprocess.run([*command, *FLAGS, *units, "-o", made], capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"the C++ compiler {command[0]} could not be run: {error.strerror}") from error
        if done.returncode:
            lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[-1])}")
        made.replace(target)
