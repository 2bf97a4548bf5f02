"""What the probe needs of CUDA through torch: which GPU it takes, memory on both sides of the link, time, a bus awake.

It measures nothing; `moeflow.probe.bandwidth` does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from moeflow.errors import DeviceError
from moeflow.kernels.pages import allocate, device_address, register, unregister
from moeflow.schema import Gpu

__all__ = ["cuda_gpu", "cuda_memory", "event_timer", "no_cuda_reason", "registered", "wake"]

MIB = 1 << 20
WAKE_SECONDS = 0.3  # of copies before the first that counts: a bus at rest is slowed down, and so are a GPU's clocks


def cuda_gpu() -> Gpu | None:
    """The GPU that torch takes by default, as CUDA describes it; None where torch cannot use one of NVIDIA's."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    capability = f"{found.major}.{found.minor}"
    return Gpu(name=found.name, memory=found.total_memory // MIB * MIB, compute_capability=capability)


def no_cuda_reason() -> str:
    """Why `cuda_gpu` is None though the driver shows a GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} cannot start CUDA {torch.version.cuda} (driver too old?)"


def wake(copy: Callable[[slice], None], nbytes: int) -> None:
    """Make copies of all `nbytes` until bus and clocks run as under load."""
    until = time.monotonic() + WAKE_SECONDS
    while True:
        copy(slice(0, nbytes))
        torch.cuda.synchronize()
        if time.monotonic() >= until:
            return


def event_timer() -> Callable[[Callable[[], object]], float]:
    """Times by the GPU itself: a call returns before its copy ends, and launching takes time of its own."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(action: Callable[[], object]) -> float:
        stream = torch.cuda.current_stream(0)
        begin.record(stream)
        action()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return timed


@contextlib.contextmanager
def registered(nbytes: int) -> Iterator[int]:
    """Page-locked memory as the engine has it, by its address on the device."""
    memory = allocate(nbytes).fill_(1)
    if refused := register(memory):
        raise DeviceError(f"the driver would not page-lock {nbytes >> 20} MiB: {refused}")
    try:
        yield device_address(memory.data_ptr())
    finally:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()  # nothing may still read it
        unregister(memory)


@contextlib.contextmanager
def cuda_memory(nbytes: int) -> Iterator[None]:
    """Turn CUDA's errors into one with a remedy, and leave no buffers in torch's caches for the engine to lack."""
    try:
        with torch.cuda.device(0):
            yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(
            f"cannot measure the GPU with {nbytes >> 20} MiB of its memory: {reason}; end other programs that use "
            "the GPU, or name a file of hardware/ instead of probing"
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):  # after an error of CUDA there may be nothing left to ask
            torch.cuda.empty_cache()
            if hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.11 has none; its pinned buffer is reused
                torch.accelerator.empty_host_cache()
