"""What NVIDIA's driver (pynvml) says of the GPU in use and its bus.

The driver is asked and not torch, because that takes milliseconds and starts no CUDA context. It may refuse single
questions (virtual GPUs, containers, new boards): what was refused is left out and said, unless CUDA knows it. Nothing
that tells one board from another of its kind gets into the result: no serial number, no UUID.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moeflow.errors import DeviceError
from moeflow.schema import BusState, Gpu, Pcie

__all__ = ["Board", "find_board", "find_gpu", "read_bus"]

MIB = 1 << 20


@dataclass(frozen=True)
class Board:
    """The GPU in use, as its driver shows it."""

    gpu: Gpu
    pcie: Pcie | None
    """What the bus can do, as far as both ends have it."""
    free: int | None
    """Bytes of its memory that nobody uses now."""
    driver: str | None
    """The driver's version."""
    remarks: tuple[str, ...] = ()
    """Which GPU of several this is, and what the driver would not say."""


def find_gpu(named: str | None = None) -> Gpu | None:
    """The GPU of `find_board` alone; `named` is what torch calls its first.

    Raises:
        DeviceError: as for it.
    """
    board = find_board(named)
    return board.gpu if board else None


def find_board(named: str | None = None, known: Gpu | None = None) -> Board | None:
    """The first GPU that CUDA_VISIBLE_DEVICES shows; None without driver or GPU. No rate.

    Args:
        named: as torch names its first GPU. CUDA numbers GPUs fastest first, the driver by slot; among several
            different ones the name decides.
        known: what CUDA says of it, taken where the driver would not say.

    Raises:
        DeviceError: the driver is broken, does not say what is needed, or the GPU is a MIG slice.
    """
    with _session(named) as handle:
        return None if handle is None else _describe(handle, known)


@contextlib.contextmanager
def read_bus(named: str | None = None) -> Iterator[Callable[[], BusState | None]]:
    """What says how fast the bus of `find_board`'s GPU runs at the time it is called; None if the driver does not.

    Raises:
        DeviceError: the driver is broken.
    """
    import pynvml

    def now() -> BusState | None:
        questions = (pynvml.nvmlDeviceGetCurrPcieLinkGeneration, pynvml.nvmlDeviceGetCurrPcieLinkWidth)
        generation, lanes = (_ask("", lambda q=q: q(handle), []) for q in questions)  # type: ignore[misc]
        with contextlib.suppress(ValidationError):  # 0 lanes, as virtual machines say
            return BusState.model_validate({"generation": generation, "lanes": lanes})
        return None

    with _session(named) as handle:
        yield now if handle is not None else lambda: None


@contextlib.contextmanager
def _session(named: str | None) -> Iterator[Any | None]:
    """The driver, open, and its handle of the GPU; None if there is no such GPU."""
    visible = _first_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if visible is None:
        yield None
        return
    if "MIG" in f"{visible} {named}":
        raise DeviceError(
            "the GPU is a MIG slice, whose share of memory and bandwidth the probe cannot tell; describe it in a "
            "YAML file as those in hardware/ and name that file as the profile's hardware"
        )
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        yield None
        return
    except pynvml.NVMLError as error:
        raise _broken(error) from error
    try:
        yield _choose(visible, named)
    except pynvml.NVMLError as error:
        raise _broken(error) from error
    finally:
        pynvml.nvmlShutdown()


def _first_visible(setting: str | None) -> int | str | None:
    """What CUDA_VISIBLE_DEVICES names first: a number or (the start of) a UUID; None hides all GPUs."""
    if setting is None:
        return 0
    first = setting.split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return first
    number = re.match(r"\+?\d+", first)  # CUDA takes the digits that it begins with, and stops at what has none
    return int(number[0]) if number else None


def _choose(visible: int | str, named: str | None) -> Any | None:
    import pynvml

    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    if isinstance(visible, str):
        return next((h for h in handles if pynvml.nvmlDeviceGetUUID(h).startswith(visible)), None)
    by_number = handles[visible : visible + 1]  # among equal GPUs both count alike
    by_name = [h for h in (*by_number, *handles) if pynvml.nvmlDeviceGetName(h) == named]
    return next(iter(by_name or by_number), None)


def _describe(handle: Any, known: Gpu | None) -> Board:
    import pynvml

    remarks: list[str] = []
    name = _ask("name", lambda: pynvml.nvmlDeviceGetName(handle), remarks)
    memory = _ask("memory", lambda: pynvml.nvmlDeviceGetMemoryInfo(handle), remarks)
    capability = _ask("compute capability", lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle), remarks)
    found = {
        "name": name,
        "memory": memory and memory.total // MIB * MIB,
        "compute_capability": capability and "{}.{}".format(*capability),
    }
    missing = {key for key, value in found.items() if not value}
    if missing and known is None:
        raise DeviceError(
            f"the NVIDIA driver does not tell all of the GPU ({'; '.join(remarks)}), and CUDA was not asked; describe "
            "it in a YAML file as those in hardware/"
        )
    gpu = Gpu(**found | {key: getattr(known, key) for key in missing})
    count = pynvml.nvmlDeviceGetCount()
    if count > 1:
        number = pynvml.nvmlDeviceGetIndex(handle)
        remarks.append(f"GPU {number} of {count}, counted from 0: CUDA_VISIBLE_DEVICES chooses another")
    pcie = _pcie(handle, remarks)
    driver = _ask("driver version", lambda: str(pynvml.nvmlSystemGetDriverVersion()), remarks)
    return Board(gpu, pcie, memory and memory.free, driver, tuple(remarks))


def _pcie(handle: Any, remarks: list[str]) -> Pcie | None:
    """The bus at most; None if it is one that `Pcie` does not know, such as a virtual machine's."""
    import pynvml

    generation = _ask("PCIe generation", lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle), remarks)
    lanes = _ask("PCIe lanes", lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle), remarks)
    if generation is None or lanes is None:
        return None
    try:
        return Pcie.model_validate({"generation": generation, "lanes": lanes})
    except ValidationError:
        remarks.append(f"the bus is left out: the driver calls it PCIe {generation}.0 x{lanes}")
        return None


def _ask(what: str, question: Callable[[], Any], remarks: list[str]) -> Any | None:
    """An answer, or None with a remark where the driver knows the GPU but not this of it, or may not tell."""
    import pynvml

    try:
        return question()
    except (
        pynvml.NVMLError_NotSupported,
        pynvml.NVMLError_NoPermission,
        pynvml.NVMLError_FunctionNotFound,
        pynvml.NVMLError_Unknown,
    ) as error:
        remarks.append(f"the driver does not tell the {what} ({error})")
        return None


def _broken(error: Exception) -> DeviceError:
    return DeviceError(
        f"the NVIDIA driver does not answer: {error}; see whether nvidia-smi works (a new driver needs a restart), "
        "or set CUDA_VISIBLE_DEVICES to nothing to go without the GPU"
    )
