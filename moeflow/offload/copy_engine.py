"""The device's copy engine, called without Python's lock and without torch: from host memory to the device, in order.

The driver's library is called directly: through ctypes it runs without Python's lock, and takes plain addresses, which
torch's copies do not. It decides nothing; `offload.mover` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from moeflow.errors import DeviceError
from moeflow.offload.mover import Blobs, Mover, pays
from moeflow.probe.devices import find_cpu

__all__ = ["CopyEngine", "copy_engine_mover"]

# During a pass the mover waits on one core and whoever reads tokens on another; with none left for all others, the
# mover would be held up for whole time slices. Measured on 16.
LEAST_CORES = 4


def copy_engine_mover(device: torch.device, layers: Sequence[Blobs], jobs: int) -> Mover | None:
    """A mover that feeds the device's copy engine, where that is faster than kernels.

    Raises:
        DeviceError: it would be, but cannot be fed on this system.
    """
    if not pays(layers) or find_cpu().cores < LEAST_CORES:
        return None
    return Mover(CopyEngine(device), layers, jobs, device)


class CopyEngine:
    """A stream of its own on a CUDA device.

    Raises:
        DeviceError: the driver's library is not where it is looked for.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        try:
            library = ctypes.CDLL("libcuda.so.1")
            self._copy, self._write = library.cuMemcpyHtoDAsync_v2, library.cuStreamWriteValue32_v2
            self._set, current = library.cuCtxSetCurrent, library.cuCtxGetCurrent
        except (OSError, AttributeError) as error:
            raise DeviceError(f"the copy engine cannot be fed: {error}") from error
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._write.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        self._set.argtypes = [ctypes.c_void_p]
        self._context = ctypes.c_void_p()
        with torch.cuda.device(device):
            tried = torch.zeros(1, dtype=torch.int32, device=device)  # there is a context from here on
            torch.cuda.current_stream().synchronize()
            self._check(current(ctypes.byref(self._context)))
        self.announce(tried.data_ptr(), -1)  # not every system lets streams write
        self.wait()
        if int(tried) != -1:
            raise DeviceError("the copy engine cannot be fed: a stream's write did not arrive")

    def enter(self) -> None:
        """Make the calling thread one that may copy."""
        self._check(self._set(self._context))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Start a copy from page-locked host memory to the device, behind those started before.

        Raises:
            DeviceError: the driver refuses.
        """
        self._check(self._copy(target, source, nbytes, self._stream.cuda_stream))

    def announce(self, target: int, value: int) -> None:
        """Write four bytes once all copies started before can be seen by every kernel.

        A copy of four bytes would not do: the driver promises the order of copies to what follows in a stream only, and
        not to a kernel that watches the bytes.

        Raises:
            DeviceError: the driver refuses.
        """
        self._check(self._write(self._stream.cuda_stream, target, value & 0xFFFFFFFF, 0))

    def wait(self) -> None:
        """Until all is there that was started."""
        self._stream.synchronize()

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise DeviceError(f"the copy engine cannot be fed: CUDA error {code}")
