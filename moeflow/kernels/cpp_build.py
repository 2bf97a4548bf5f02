"""Compiles the CPU's kernels, `cpp/*.cpp`, into one shared library: needs a C++ compiler and nothing else.

The standard library only, since a build hook runs it before anything is installed. Every file has the flags of its own
level of instructions; which level runs is decided by the machine that loads the library (`cpp/levels.cpp`), so that one
library serves all x86-64 machines. What it needs of libstdc++ and libgcc is inside it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["COMPILERS", "SOURCE", "UNITS", "build"]

SOURCE = Path(__file__).parent / "cpp"
COMPILERS = ("g++", "clang++")

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
UNITS: dict[str, tuple[str, ...]] = {
    "rows_vnni.cpp": (*AVX512, "-mavx512vnni"),
    "rows_avx512.cpp": AVX512,
    "rows_avx2.cpp": AVX2,
    "rows_portable.cpp": ("-O2",),
    "unpack_avx2.cpp": AVX2,
    "unpack_portable.cpp": (),
    "prepare.cpp": ("-fno-trapping-math",),  # no result depends on it, and loops with conditions become vectors
    "levels.cpp": (),
    "api.cpp": (),
    "crew.cpp": (),
}
"""Each file, those that take longest first, and its own flags."""

# Without contraction: where a product and a sum are one operation is said by the source.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fno-exceptions",
         "-fno-rtti", "-fPIC", "-fvisibility=hidden", "-pthread")  # fmt: skip
LINK = ("-shared", "-s", "-pthread", "-static-libstdc++", "-static-libgcc")


def build(target: Path, compiler: str | None = None) -> None:
    """Compile and link the library; `target` is replaced when all has gone well.

    Args:
        target: the library's file.
        compiler: command of g++ or clang++; None: `CXX` of the environment, or the first that is found.

    Raises:
        RuntimeError: there is no compiler, or it refuses a file; the message holds what it says.
        OSError: the library cannot be written.
    """
    command = compiler or os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if command is None:
        raise RuntimeError(f"there is no C++ compiler: none of {', '.join(COMPILERS)} is on the path")
    with tempfile.TemporaryDirectory(prefix="moeflow-build-") as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda unit: _compile(command, Path(place), *unit), _units().items()))
        handle, part = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
        try:
            _call(command, *LINK, *objects, "-o", part)
            Path(part).chmod(0o755)
            Path(part).replace(target)
        finally:
            Path(part).unlink(missing_ok=True)


def _units() -> dict[str, tuple[str, ...]]:
    """Those for this machine's architecture."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return UNITS
    return {name: flags for name, flags in UNITS.items() if not any(flag.startswith("-m") for flag in flags)}


def _compile(command: str, place: Path, name: str, flags: tuple[str, ...]) -> Path:
    target = place / f"{name}.o"
    _call(command, *FLAGS, *flags, "-c", SOURCE / name, "-o", target)
    return target


def _call(command: str, *arguments: str | Path) -> None:
    try:
        result = subprocess.run([*command.split(), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"the C++ compiler {command} does not run: {error}") from error
    if result.returncode:
        raise RuntimeError(f"{command} failed with {result.returncode}:\n{result.stderr.strip()}")
