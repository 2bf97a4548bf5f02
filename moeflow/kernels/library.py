"""The CPU kernels' shared library, opened once a process by ctypes; where there is none, why and what to do.

ctypes and a plain C interface, so that one wheel serves every version of Python and torch. moeflow works without the
library: whoever can do so asks `why_not` first. What its functions mean is the business of who calls them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from moeflow.errors import DeviceError

__all__ = ["INTERFACE", "library", "why_not"]

INTERFACE = 2  # moeflow_version() in cpp/
LIBRARY = Path(__file__).parent / "_cpu.so"

# pip keeps the wheels that it builds, so without --no-cache-dir it would install the same again
REMEDY = "install moeflow again with a C++ compiler, g++ or clang++ (pip: --force-reinstall --no-deps --no-cache-dir)"


def library() -> ctypes.CDLL:
    """The library with the CPU kernels.

    Raises:
        DeviceError: not built, not loadable, or of another version than this moeflow; with the remedy.
    """
    found = _open()
    if isinstance(found, str):
        raise DeviceError(f"CPU kernels are off: {found}")
    return found


def why_not() -> str | None:
    """Why there are no CPU kernels, with the remedy; None where there are."""
    found = _open()
    return found if isinstance(found, str) else None


@cache
def _open() -> ctypes.CDLL | str:
    if not LIBRARY.exists():
        note = LIBRARY.with_suffix(".missing")  # left by scripts/build_hook.py
        reason = f": {note.read_text(encoding='utf-8').strip()}" if note.exists() else ""
        return f"{LIBRARY.name} was not built{reason}; {REMEDY}"
    try:
        opened = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded: {error}; {REMEDY}"
    try:
        version = opened.moeflow_version()
    except AttributeError:
        version = None
    if version != INTERFACE:
        return f"{LIBRARY.name} has interface {version}, and this moeflow needs {INTERFACE}; {REMEDY}"
    return opened
