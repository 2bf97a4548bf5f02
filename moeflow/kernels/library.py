"""The CPU's kernels as a library of this process: found beside this file, where installing has put it."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from moeflow.errors import DeviceError

__all__ = ["PATH", "library"]

PATH = Path(__file__).parent / "_cpu.so"


@cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        DeviceError: it is not there, or the system does not load it.
    """
    try:
        return ctypes.CDLL(str(PATH))
    except OSError as error:
        raise DeviceError(f"CPU kernels are off: {error}; reinstall with a C++ compiler (g++ or clang++)") from error
