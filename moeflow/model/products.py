"""Products with packed matrices on a CPU: threads share their rows, and unpack them for passes of many tokens.

One for an engine, for its experts and its packed layers. What a product means is `kernels.cpu`'s, how rows are shared
out `kernels.crew`'s; here is what both are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.artifact.layout import row_blocks
from moeflow.errors import DeviceError
from moeflow.kernels.cpu import CpuGemv, CpuVectors, unsupported
from moeflow.kernels.crew import Crew
from moeflow.kernels.unpack import Workspace
from moeflow.schema import Manifest, PackedMatrix, Plan, PlannedCpu

__all__ = ["PACKED_TOKENS", "CpuUnpacker", "Product", "Products", "products_of"]

PACKED_TOKENS = 32
"""Up to so many vectors meet a matrix packed. Beyond, unpacking it for torch's product may be as fast: on two cores no
level of instructions was slower up to here (AVX2 with int8 was as fast), and VNNI was faster still at 64."""
ALONE = 1 << 16  # numbers that one thread unpacks before others are awake


@dataclass(frozen=True)
class Product:
    """One matrix times a few vectors."""

    gemv: CpuGemv
    blob: Tensor
    x: CpuVectors
    out: Tensor
    """float32 [vectors, N], to be filled."""


class Products:
    """Threads, until `close`.

    Args:
        planned: how many.
        matrices: all that will be unpacked.
        dtype: of unpacked matrices.

    Raises:
        DeviceError: there are no kernels, or the system gives no threads.
    """

    def __init__(self, planned: PlannedCpu, matrices: Iterable[PackedMatrix], dtype: torch.dtype):
        self._crew = Crew(planned.threads)
        self._threads = planned.threads
        self._pool = ThreadPoolExecutor(planned.threads, thread_name_prefix="moeflow-unpack")
        self.workspace = Workspace(matrices, dtype, torch.device("cpu"))
        """For one unpacked matrix at a time."""
        self.dtype = dtype

    def run(self, products: Sequence[Product]) -> None:
        """Compute all; their results are there when this returns."""
        self._crew.run([p.gemv.job(p.blob, p.x, p.out) for p in products])

    def gemv(self, matrix: PackedMatrix, planes: int = 2) -> CpuGemv | None:
        """What multiplies a matrix, or None where no kernel does."""
        return None if unsupported(matrix) else CpuGemv(matrix, planes)

    def unpacker(self, matrix: PackedMatrix) -> CpuUnpacker | None:
        """What unpacks a matrix, or None where no kernel does."""
        gemv = self.gemv(matrix)
        return CpuUnpacker(self, gemv) if gemv is not None and not gemv.plain else None

    def unpack(self, gemv: CpuGemv, blob: Tensor, out: Tensor) -> None:
        """A matrix to `out` [N, K]."""
        rows = gemv.matrix.rows
        step = -(-rows // self._threads) if out.numel() > ALONE else rows
        parts = [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
        for _ in self._pool.map(lambda part: gemv.unpack(blob, out.dtype, out, *part), parts):
            pass

    def close(self) -> None:
        """End the threads."""
        self._crew.close()
        self._pool.shutdown()


class CpuUnpacker:
    """One matrix shape, ready to be unpacked; called as `kernels.unpack.Unpacker`."""

    def __init__(self, products: Products, gemv: CpuGemv):
        self._products, self._gemv = products, gemv

    def __call__(self, blob: Tensor, workspace: Workspace | None = None) -> Tensor:
        """The matrix [N, K]: in `workspace` if there is one, which a later call overwrites."""
        shape = self._gemv.matrix.rows, self._gemv.matrix.columns
        out = workspace.take(*shape) if workspace is not None else torch.empty(shape, dtype=self._products.dtype)
        self._products.unpack(self._gemv, blob, out)
        return out


def products_of(manifest: Manifest, plan: Plan, device: torch.device) -> tuple[Products | None, str | None]:
    """What multiplies for a host-driven engine on a CPU, or why nobody does although the plan wants it."""
    if plan.cpu is None or device.type != "cpu":
        return None, None
    blocks = [block for matrix in manifest.resident for block in row_blocks(matrix)]
    matrices = [*blocks, *(m for layout in manifest.layouts for m in layout.matrices)]
    try:
        return Products(plan.cpu, matrices, getattr(torch, plan.dtype)), None
    except DeviceError as error:
        return None, f"torch multiplies in place of the CPU's kernels, slower: {error}"
