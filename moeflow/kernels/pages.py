"""Host memory that a device reads by itself: whole pages of ordinary memory, registered with the driver.

torch's own allocator of page-locked memory takes ten times as long a GiB and rounds each piece up to a power of two.
Whoever registers memory unregisters it before it is freed: addresses that are still registered are refused to whoever
is given them next. What to do where the system refuses is the caller's business.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from moeflow.errors import DeviceError

__all__ = ["HUGE", "PORTABLE_AND_MAPPED", "allocate", "device_address", "register", "unregister"]

HUGE = 2 << 20  # bytes of a huge page
PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegisterPortable, cudaHostRegisterMapped


def allocate(nbytes: int) -> Tensor:
    """uint8 [nbytes] that begins at a page: two registered pieces may not share one.

    So does its storage, where torch looks when it is asked whether a tensor is page-locked (`is_pinned`). Large pieces
    begin at a huge page and ask for them: a device that reads many gigabytes translates every page's address.

    Raises:
        OSError: the system has no such memory left.
    """
    page = HUGE if nbytes >= HUGE else mmap.PAGESIZE
    memory = mmap.mmap(-1, nbytes + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if page == HUGE:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % page
    return torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=nbytes) if nbytes else whole[:0]


def register(memory: Tensor) -> str | None:
    """Page-lock `memory` for every CUDA device, or say why the driver would not."""
    runtime = torch.cuda.cudart()
    code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE_AND_MAPPED)
    if int(code) == 0:
        return None
    with contextlib.suppress(RuntimeError):  # the runtime remembers its error, and the next launch would raise it
        torch.zeros(1, device="cuda")
    return str(runtime.cudaGetErrorString(code))


def unregister(memory: Tensor) -> None:
    """Let go of registered memory, which nothing on the device may still read."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def device_address(pointer: int) -> int:
    """The device's address of registered memory; on most systems the host's own.

    Raises:
        DeviceError: the driver does not map such memory on the current device.
    """
    from cuda.bindings import driver

    code, address = driver.cuMemHostGetDevicePointer(pointer, 0)
    if int(code):
        raise DeviceError(f"CUDA does not map page-locked memory on this device ({code.name})")
    return int(address)
