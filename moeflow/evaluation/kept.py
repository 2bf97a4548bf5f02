"""Logits of one model on disk, until another has run the same text: exact, and no two models in memory at once.

The two engines run one after another, since each is planned for the whole machine. What the first one predicts is kept
in full, float32, since the exact divergence needs every probability; in a temporary file, since memory would not hold
it. The file has no name: the system frees it whatever becomes of the process. Not kept for a later run.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from moeflow.errors import CapacityError
from moeflow.files import storage_errors
from moeflow.schema.units import format_size

__all__ = ["KeptLogits"]


class KeptLogits:
    """Rows that are written in order, then read in the same order, as often as they are rewound. A context manager."""

    def __init__(self, rows: int):
        """For `rows` rows, in the directory of temporary files."""
        self._rows = rows
        self._columns = 0
        self._place = Path(tempfile.gettempdir())
        with storage_errors(self._place, "write"):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by close

    def write(self, rows: Tensor) -> None:
        """Add float32 rows [n, V].

        Raises:
            CapacityError: the disk has not as much left as all rows will take.
        """
        if not self._columns:
            self._columns = rows.shape[1]
            self._check_space(4 * self._rows * self._columns)
        with storage_errors(self._place, "write"):
            rows.numpy().tofile(self._file)

    def _check_space(self, needed: int) -> None:
        with storage_errors(self._place, "measure"):
            free = shutil.disk_usage(self._place).free
        if needed > free:
            raise CapacityError(
                f"{self._place}: the reference's predictions take {format_size(needed)} for a while, "
                f"{format_size(free)} are free; evaluate fewer tokens (--tokens), or set TMPDIR to a larger disk"
            )

    def rewind(self) -> None:
        """Read from the first row on."""
        with storage_errors(self._place, "write"):
            self._file.seek(0)

    def read(self, count: int) -> Tensor:
        """The next rows [count, V]."""
        with storage_errors(self._place, "read"):
            rows = np.fromfile(self._file, np.float32, count * self._columns)
        return torch.from_numpy(rows.reshape(count, self._columns))

    def close(self) -> None:
        """Free the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
