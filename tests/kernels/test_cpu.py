"""The CPU's kernels against the emulated GPU's, bit for bit, and against dequantize + matmul, at every level here.

Inputs are fresh; the seed of a failing case is printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gemv_checks import FORMATS, matrix_of, random_pool
from torch import Tensor

from moeflow.kernels import cpp_build, cpu
from moeflow.kernels import library as library_module
from moeflow.kernels.gemv import Gemv, Jobs
from moeflow.schema import PackedMatrix

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

CPU = torch.device("cpu")
INTEGER = [name for name in FORMATS if not name.startswith(("none", "nf4"))]
# Rows, columns: blocks of 16 chunks that are full and not, for chunks of 16, 32 and 64 columns; a pair and more.
SHAPES = ((7, 384), (4, 1024), (3, 128 * 19))


@pytest.fixture(scope="module", autouse=True)
def _library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of these sources: the one beside them if it is newer, or one that is compiled now."""
    sources = [path.stat().st_mtime for path in (*cpp_build.SOURCE.iterdir(), Path(cpp_build.__file__))]
    with pytest.MonkeyPatch.context() as patch:
        if not library_module.PATH.exists() or library_module.PATH.stat().st_mtime < max(sources):
            target = tmp_path_factory.mktemp("cpu") / "_cpu.so"
            cpp_build.build(target)
            patch.setattr(library_module, "PATH", target)
        library_module.library.cache_clear()
        cpu._functions.cache_clear()
        yield
    library_module.library.cache_clear()
    cpu._functions.cache_clear()


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed = int(torch.seed() % (1 << 32))
    torch.manual_seed(seed)
    print("seed", seed)


def levels() -> range:
    return range(cpu.best_level() + 1)


def activations(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * torch.exp(torch.randn(columns))


def emulated(matrix: PackedMatrix, blob: Tensor, x: Tensor) -> Tensor:
    """What the GPU's kernels compute."""
    gemv = Gemv(emulator.EmulatedLauncher(), matrix, CPU)
    return torch.cat([gemv.multiply(gemv.prepare(row[None]), Jobs(blob[None], None, 1)) for row in x])


@pytest.mark.parametrize("name", INTEGER)
def test_products_are_the_gpus_bit_for_bit(name: str) -> None:
    for rows, columns in SHAPES:
        matrix = matrix_of(name, rows, columns)
        blob, x = random_pool(matrix, 1)[0], activations(8, columns)
        expected = emulated(matrix, blob, x)
        for level in levels():
            gemv = cpu.CpuGemv(matrix, level=level)
            for count in (1, 3, 8) if level else (2,):
                product = gemv.multiply(blob, gemv.prepare(x[:count]))
                assert torch.equal(product, expected[:count]), (name, rows, columns, level, count)
