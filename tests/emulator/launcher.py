"""Runs the package's CUDA sources on the CPU: a `Launcher` of the same protocol, with g++ in NVRTC's place.

A kernel gets CPU tensors and nothing is timed; what is proved is that it computes what it should, that its threads meet
where they must, and, with `order`, that it does not depend on luck. The device's own arithmetic is proved by the tests
marked gpu. A kernel is compiled once a session.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

from moeflow.kernels.compiler import SOURCE
from moeflow.kernels.launcher import Grid

__all__ = ["EmulatedLauncher", "EmulatorError", "ORDERS", "available"]

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")
CHECKS = "-fsanitize=alignment,null,bounds,shift-exponent,integer-divide-by-zero"
# -fno-weak: shared memory in an inline function lies in the same section as all other; no-strict-aliasing and
# fp-contract: what NVRTC promises, and what add_rn and mul_rn need.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-weak", "-fno-strict-aliasing", "-ffp-contract=off", "-w", f"-I{HERE}"]
_lock = threading.Lock()

Argument = Tensor | int | float | None


class EmulatorError(RuntimeError):
    """A kernel did what is an error, or undefined, on the device."""


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


class EmulatedLauncher:
    """Compiles and runs kernels on the CPU.

    Args:
        order: which of the threads, and blocks, that may run does so next. `random` switches threads at atomics too.
        seed: of the random order.
        directory: where the sources lie; `kernels/source` is searched for what they include.
    """

    def __init__(self, order: str = "forward", seed: int = 0, directory: Path = SOURCE):
        self._order = ORDERS.index(order)
        self._seed = seed
        self._directory = directory

    def kernel(self, source: str, name: str, defines: Mapping[str, int | str] = {}) -> EmulatedKernel:
        """The function `name` of a source file, compiled with macros `defines`.

        Raises:
            EmulatorError: g++ refuses it; the message holds what it says.
        """
        with _lock:
            library = _compile(self._directory / source, name, tuple(sorted(defines.items())))
        return EmulatedKernel(library, name, self._order, self._seed)


class EmulatedKernel:
    """A compiled function."""

    def __init__(self, library: ctypes.CDLL, name: str, order: int, seed: int):
        self._name = name
        self._order = order
        self._seed = seed
        library.moeflow_parameters.restype = ctypes.c_char_p
        library.moeflow_run.restype = ctypes.c_char_p
        self._parameters: str = library.moeflow_parameters().decode()
        self._run = library.moeflow_run

    def __call__(self, grid: Grid, block: int, *arguments: Argument) -> None:
        """Run all blocks, one after another.

        Raises:
            EmulatorError: the arguments do not fit, threads wait for each other for ever, or memory is misused.
        """
        if len(arguments) != len(self._parameters):
            raise EmulatorError(f"{self._name} has {len(self._parameters)} parameters, {len(arguments)} arguments came")
        values = [self._value(i, *pair) for i, pair in enumerate(zip(self._parameters, arguments, strict=True))]
        addresses = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
        sizes = (ctypes.c_int * 3)(*((grid, 1, 1) if isinstance(grid, int) else grid))
        if min(sizes) < 1 or max(sizes[1:]) > 65535:
            raise EmulatorError(f"{self._name}: a grid of {tuple(sizes)} blocks is not possible")
        with _lock:
            problem = self._run(addresses, sizes, block, self._order, ctypes.c_ulonglong(self._seed))
        if problem is not None:
            raise EmulatorError(f"{self._name}: {problem.decode()}")

    def _value(self, index: int, kind: str, argument: Argument) -> ctypes._SimpleCData:
        if kind == "p" and isinstance(argument, Tensor):
            if argument.device.type != "cpu" or not argument.is_contiguous():
                raise EmulatorError(f"{self._name}: argument {index} is no contiguous tensor on the CPU")
            return ctypes.c_void_p(argument.data_ptr())
        if kind == "p" and (argument is None or isinstance(argument, int)):  # int: an address in host memory
            return ctypes.c_void_p(argument)
        if kind == "i" and isinstance(argument, int):
            return ctypes.c_longlong(argument)
        if kind == "f" and isinstance(argument, float):
            return ctypes.c_float(argument)
        wanted = {"p": "a pointer", "i": "a long long", "f": "a float"}[kind]
        raise EmulatorError(f"{self._name}: parameter {index} is {wanted}, the argument is a {type(argument).__name__}")


@cache
def _directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="moeflow-emulator-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def _stacks() -> ctypes.Array[ctypes.c_void_p]:
    """Where all kernels keep their threads' stacks."""
    return (ctypes.c_void_p * 1024)()


@cache
def _runtime() -> Path:
    target = _directory() / "runtime.o"
    _call("g++", *FLAGS, "-O2", "-c", HERE / "runtime.cpp", "-o", target)
    return target


@cache
def _compile(source: Path, name: str, defines: tuple[tuple[str, int | str], ...]) -> ctypes.CDLL:
    place = Path(tempfile.mkdtemp(prefix=f"{source.stem}-", dir=_directory()))
    unit, binary, library = (place / f"{name}{ending}" for ending in (".cpp", ".o", ".so"))
    # Macros come after the emulator's own headers, so that one called T or N does not reach them.
    macros = "".join(f"#define {key} {value}\n" for key, value in defines)
    unit.write_text(f'#include "cuda.hpp"\n{macros}#include "{source.name}"\nMOEFLOW_KERNEL({name})\n')
    places = [f"-I{source.parent}", f"-I{SOURCE}"]
    _call("g++", *FLAGS, CHECKS, "-DMOEFLOW_EMULATOR", *places, "-c", unit, "-o", binary)
    # Linked by itself, without the sanitizers' library. Bsymbolic: what a source calls like a function of libc is its.
    _call("g++", "-shared", "-Wl,-Bsymbolic", binary, _runtime(), "-lm", "-o", library)
    built = ctypes.CDLL(str(library))
    built.moeflow_use_stacks(_stacks())
    return built


def _call(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EmulatorError(result.stderr)
