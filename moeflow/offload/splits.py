"""Which rows of missing experts the link brings: the tables by which the device decides, and the copies that follow.

Where the CPU computes beside the device, some experts are brought whole and admitted to the cache, the first rows of
one more are brought as well, and all other rows are the CPU's. `kernels/source/cache.cu` decides, from ratios on the
desk that `sharing.cu` moves after each exchange. Here is the memory of both; who computes the rows is the business of
`offload.sharing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.kernels.copy import COPY_BLOCKS, COPY_THREADS
from moeflow.kernels.gemv import Rows
from moeflow.kernels.launcher import Launcher
from moeflow.schema import BlobLayout, Manifest

__all__ = ["Split", "Splits"]

# sharing.cuh's, as all below
ONE, CLASSES = 4096, 6
ALONE, TAKEN, STEP, RATIO = 2, 3, 6, 16
EARLY, HERE, CUTS, SHARES = 0, 2, 4, 6

STEPS = 16  # of ONE: by so much a ratio moves in a layer


@dataclass(frozen=True)
class Split:
    """Which rows of a token's choices are computed where; for one layer, until the next is looked up."""

    shares: Tensor
    """int32 [SHARES, n]."""
    experts: Tensor
    """int32 [n]: the choices."""

    def early(self, half: int) -> Rows:
        """Rows of cached experts."""
        return Rows(None, self.shares[EARLY + half])

    def brought(self, half: int) -> Rows:
        """Rows that the link brings."""
        return Rows(self.shares[EARLY + half], self.shares[HERE + half])

    def begins(self, half: int) -> Tensor:
        """int32 [n]: from here on rows are the CPU's."""
        return self.shares[HERE + half]

    def others(self, half: int, only_if: Tensor) -> Rows:
        """The CPU's rows, if so."""
        return Rows(self.shares[HERE + half], None, only_if)


class Splits:
    """The desk and the tables of a split, shared by all layers.

    Args:
        manifest: the packed model.
        launcher: runs the kernels.
        sources: address of each layer's first blob in page-locked memory, as the device sees it.
        device: where the kernels run.
        share: of what is missing, the CPU's to begin with.
        fixed: whether it stays so.
    """

    def __init__(
        self, manifest: Manifest, launcher: Launcher, sources: Sequence[int], device: torch.device, share: float,
        fixed: bool,
    ):  # fmt: skip
        self.launcher, self.sources = launcher, sources
        self.layouts = [manifest.layout_of(i) for i in range(len(manifest.layers))]
        self.choices = manifest.model.top_k
        self.computed = torch.zeros(len(sources), dtype=torch.int64, device=device)
        """Bytes of weights that were left to the CPU, int64 [layers]."""
        self.desk = torch.zeros(RATIO + 2 * CLASSES, dtype=torch.int32, device=device)
        self._shares = torch.zeros(SHARES * self.choices, dtype=torch.int32, device=device)
        self._experts = torch.zeros(self.choices, dtype=torch.int32, device=device)
        self._parts = {id(y): [_parts(y, half, device) for half in (0, 1)] for y in self.layouts}
        self.desk[STEP] = 0 if fixed else STEPS
        self.desk[RATIO:] = round(ONE * (1 - share))

    @property
    def ratios(self) -> list[list[float]]:
        """The link's share of what is missing by class, of gate and up, and of down; waits for the device."""
        return (self.desk[RATIO:].view(CLASSES, 2).double() / ONE).tolist()

    def reset(self) -> None:
        """As if nothing were under way; the ratios stay."""
        self.desk[1:STEP] = 0

    def split(self, choices: int) -> Split:
        """Where `lookup` is to write."""
        assert choices == self.choices, "one token's choices"
        return Split(self._shares.view(SHARES, choices), self._experts)

    def lookup_arguments(self, layer: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """What cache.cu's `lookup` takes beside the rest."""
        gate_up, down = self.layouts[layer].matrices
        return self.desk, self._shares, self._experts, gate_up.rows, down.rows

    def copy(
        self, layer: int, half: int, pool: Tensor, jobs: Tensor, job_count: Tensor, progress: Tensor,
        pieces: tuple[int, int], counters: Tensor, defines: Mapping[str, int | str],
    ) -> None:  # fmt: skip
        """Copy what the link is to bring of one half, in the current stream."""
        layout, cuts = self.layouts[layer], self._shares.view(SHARES, -1)[CUTS:]
        rows, parts = [matrix.rows for matrix in layout.matrices], self._parts[id(layout)][half]
        self.launcher.kernel("copy.cu", "copy_rows", defines)(
            (COPY_BLOCKS, 1, 1), COPY_THREADS, self.sources[layer], pool, pool.shape[1], jobs, job_count, progress,
            *pieces, counters, cuts[half], cuts[1 - half], rows[half], rows[1 - half], parts, len(parts),
        )  # fmt: skip


def _parts(layout: BlobLayout, half: int, device: torch.device) -> Tensor:
    """int64 [parts, 2]: where the arrays of a half begin, in their order, and bytes of a row."""
    matrix = layout.matrices[half]
    parts = sorted((s.offset, s.nbytes // matrix.rows) for s in matrix.segments)
    return torch.tensor(parts, dtype=torch.int64, device=device)
