"""Runs this package's CUDA C++: compiled at run time, so that no toolkit is needed where moeflow is installed.

Whoever wants a kernel asks a `Launcher` by file and name. `CudaLauncher` is the one for a GPU; the tests have another
that runs the same sources on a CPU. A Tensor is passed as its pointer, an int as `long long` (or a pointer's number),
a float as `float`, None as a null pointer. Nothing is checked against the kernel's parameters here: the tests' launcher
does that.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moeflow.errors import DeviceError
from moeflow.kernels.compiler import REMEDY, SOURCE, Defines, cached_cubin, compile_cubin, full_source

__all__ = ["Argument", "CudaLauncher", "Defines", "Grid", "Kernel", "Launcher", "compile_cubin", "cuda_launcher"]

Grid = tuple[int, int, int] | int
Argument = Tensor | int | float | None
LEAST_CAPABILITY = (7, 5)
EARLY_ARCH = 90  # from here on kernels that wait for the one before may begin while it ends: 0.9 us each instead of 1.4

Macros = tuple[tuple[str, int | str], ...]


class Kernel(Protocol):
    """A compiled function."""

    def __call__(self, grid: Grid, block: int, *arguments: Argument) -> None:
        """Launch `grid` blocks of `block` threads on torch's current stream."""


class Launcher(Protocol):
    """Compiles and runs kernels on one device."""

    def kernel(self, source: str, name: str, defines: Mapping[str, int | str] = {}) -> Kernel:
        """The function `name` of a file in `kernels/source`, compiled with macros `defines`, once for equal calls."""


def cuda_launcher(device: torch.device) -> CudaLauncher:
    """The launcher for a CUDA device.

    Raises:
        DeviceError: there is no such device, it is too old, or cuda-bindings are missing.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise DeviceError(f"kernels run on a CUDA device, which {device} is not here")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
        raise DeviceError(f"{found}; moeflow's kernels need 7.5 (Turing) or more")
    return CudaLauncher(device)


class CudaLauncher:
    """Kernels through NVIDIA's driver, in torch's context.

    Args:
        device: whose architecture is compiled for; it must be torch's current device where a kernel is launched.
        directory: where the sources lie.
    """

    def __init__(self, device: torch.device, directory: Path = SOURCE):
        try:
            from cuda.bindings import driver
        except ImportError as error:
            remedy = REMEDY.format(torch.version.cuda)
            raise DeviceError(f"the kernels need cuda-bindings ({error}): {remedy}") from error
        major, minor = torch.cuda.get_device_capability(device)
        self.arch = 10 * major + minor
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.driver: Any = driver
        self._directory = directory
        self._modules: dict[tuple[str, Macros], Any] = {}
        self._kernels: dict[tuple[str, str, Macros], _CudaKernel] = {}
        self.check(driver.cuInit(0), "cuInit")
        # The primary context is the one that torch works in; retained, it is there before torch has done anything.
        handle = self.check(driver.cuDeviceGet(self.index), str(device))
        self.context = self.check(driver.cuDevicePrimaryCtxRetain(handle), str(device))

    def kernel(self, source: str, name: str, defines: Mapping[str, int | str] = {}) -> Kernel:
        """The function `name` of a source file, compiled with macros `defines`.

        Raises:
            DeviceError: it does not compile, or the file has no `extern "C"` function of that name.
        """
        macros: Macros = tuple(sorted(defines.items()))
        key = (source, name, macros)
        if key not in self._kernels:
            module = self._module(source, macros)
            function = self.check(self.driver.cuModuleGetFunction(module, name.encode()), f"{name} of {source}")
            waits = "wait_for_previous();" in full_source(source, self._directory) or defines.get("FOLLOWS") == 1
            early = self.arch >= EARLY_ARCH and waits
            self._kernels[key] = _CudaKernel(self, function, f"{name} of {source} {dict(macros)}", early)
        return self._kernels[key]

    def _module(self, source: str, macros: Macros) -> Any:
        if (source, macros) not in self._modules:
            code = cached_cubin(source, dict(macros), self.arch, self._directory)
            self.check(self.driver.cuCtxPushCurrent(self.context), source)
            try:
                self._modules[source, macros] = self.check(self.driver.cuModuleLoadData(code), source)
            finally:
                self.driver.cuCtxPopCurrent()
        return self._modules[source, macros]

    def make_current(self) -> None:
        """Enter torch's context in the calling thread, for good, as torch itself does."""
        self.check(self.driver.cuCtxSetCurrent(self.context), "context")

    def check(self, result: tuple[Any, ...], what: str) -> Any:
        """The value that a call of the driver returned.

        Raises:
            DeviceError: it failed; the message begins with `what`.
        """
        code, *values = result
        if code != self.driver.CUresult.CUDA_SUCCESS:
            _, text = self.driver.cuGetErrorString(code)
            raise DeviceError(f"{what}: {code.name}: {(text or b'unknown error').decode()}")
        return values[0] if values else None


class _Arguments:
    """Memory for arguments of given types, 8 bytes each, and the array of their addresses that a launch takes."""

    def __init__(self, types: tuple[type, ...]):
        self._packer = struct.Struct("<" + "".join("f4x" if t is float else "q" for t in types))
        self._memory = ctypes.create_string_buffer(max(8, self._packer.size))
        first = ctypes.addressof(self._memory)
        self._pointers = (ctypes.c_void_p * max(1, len(types)))(*(first + 8 * i for i in range(len(types))))
        self.address = ctypes.addressof(self._pointers)
        self._tensors = [i for i, t in enumerate(types) if issubclass(t, Tensor)]
        self._nulls = [i for i, t in enumerate(types) if t is type(None)]

    def fill(self, arguments: tuple[Any, ...]) -> None:
        values = list(arguments)
        for i in self._tensors:
            values[i] = values[i].data_ptr()
        for i in self._nulls:
            values[i] = 0
        self._packer.pack_into(self._memory, 0, *values)


class _CudaKernel:
    """A function on the device. What a launch needs is made once for each combination of argument types."""

    def __init__(self, launcher: CudaLauncher, function: Any, name: str, early: bool):
        """`early`: it waits for what precedes it in the stream by itself (primitives.cuh), so it may begin before."""
        self._launcher = launcher
        self._success = launcher.driver.CUresult.CUDA_SUCCESS
        self._function = function
        self._name = name
        self._arguments: dict[tuple[type, ...], _Arguments] = {}
        self._lock = threading.Lock()  # the driver copies the arguments before it returns, but without Python's lock
        self._early = _early_launch(launcher.driver) if early else None

    def __call__(self, grid: Grid, block: int, *arguments: Argument) -> None:
        """Launch on torch's current stream.

        Raises:
            DeviceError: the driver refuses; errors inside the kernel appear later, from torch.
        """
        types = tuple(map(type, arguments))
        packed = self._arguments.get(types)
        if packed is None:
            packed = self._arguments.setdefault(types, _Arguments(types))
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else grid
        stream = torch.cuda.current_stream(self._launcher.index).cuda_stream
        with self._lock:
            packed.fill(arguments)
            code = self._launch((x, y, z), block, stream, packed.address)
            if code != self._success and code == self._launcher.driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
                self._launcher.make_current()  # a thread in which torch has not touched the device yet
                code = self._launch((x, y, z), block, stream, packed.address)
        if code != self._success:
            self._launcher.check((code,), f"{self._name}, grid {(x, y, z)}, block {block}")

    def _launch(self, grid: tuple[int, int, int], block: int, stream: int, arguments: int) -> Any:
        driver, early = self._launcher.driver, self._early
        if early is None:
            (code,) = driver.cuLaunchKernel(self._function, *grid, block, 1, 1, 0, stream, arguments, 0)
            return code
        early.gridDimX, early.gridDimY, early.gridDimZ = grid
        early.blockDimX, early.hStream = block, stream
        (code,) = driver.cuLaunchKernelEx(early, self._function, arguments, 0)
        return code


def _early_launch(driver: Any) -> Any:
    """A launch that need not wait for the end of the kernel before it (programmatic stream serialization)."""
    value = driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    config = driver.CUlaunchConfig()
    config.blockDimY = config.blockDimZ = 1
    config.sharedMemBytes = 0
    config.attrs, config.numAttrs = [attribute], 1
    return config
