"""The CPU's kernels against the emulated GPU's, bit for bit, and against dequantize + matmul, at every level here.

Inputs are fresh; the seed of a failing case is printed.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gemv_checks import BOUND, FORMATS, matrix_of, random_pool, weights_of
from torch import Tensor

from moeflow.artifact.layout import packed_matrix
from moeflow.artifact.matrix import dequantize, parts_of
from moeflow.errors import DeviceError
from moeflow.kernels import cpp_build, cpu
from moeflow.kernels import library as library_module
from moeflow.kernels.gemv import Gemv, Jobs
from moeflow.schema import DenseScheme, PackedMatrix

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

CPU = torch.device("cpu")
PACKED = [name for name in FORMATS if not name.startswith("none")]
PLAIN = ["none float16", "none bfloat16"]
FLOAT = ["nf4", *PLAIN]  # sums in float32, which round: 1e-5 of the product
INTEGER = [name for name in PACKED if name != "nf4"]
# Rows, columns: blocks of 16 chunks that are full and not, for chunks of 16, 32 and 64 columns; a pair and more.
EIGHT_BITS = 257 * BOUND  # 32639 / 127: one plane's steps are so much wider; measured 0.4 to 2.4% of the product
SHAPES = ((7, 384), (4, 1024), (3, 128 * 19))


@pytest.fixture(scope="module", autouse=True)
def _library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of these sources: the one beside them if it is newer, or one that is compiled now."""
    sources = [path.stat().st_mtime for path in (*cpp_build.SOURCE.iterdir(), Path(cpp_build.__file__))]
    with pytest.MonkeyPatch.context() as patch:
        if not library_module.LIBRARY.exists() or library_module.LIBRARY.stat().st_mtime < max(sources):
            target = tmp_path_factory.mktemp("cpu") / "_cpu.so"
            cpp_build.build(target)
            patch.setattr(library_module, "LIBRARY", target)
        library_module._open.cache_clear()
        cpu._functions.cache_clear()
        yield
    library_module._open.cache_clear()
    cpu._functions.cache_clear()


@contextmanager
def guarded(nbytes: int) -> Iterator[Tensor]:
    """Memory that ends at the end of a page, whose neighbour cannot be read."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    size = -(-nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    array = (ctypes.c_uint8 * (size + page)).from_buffer(memory)
    neighbour = ctypes.c_void_p(ctypes.addressof(array) + size)
    assert libc.mprotect(neighbour, ctypes.c_size_t(page), 0) == 0
    yield torch.frombuffer(array, dtype=torch.uint8, count=nbytes, offset=size - nbytes)
    assert libc.mprotect(neighbour, ctypes.c_size_t(page), 3) == 0


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


@pytest.mark.parametrize("name", [*PACKED, *PLAIN])
@pytest.mark.parametrize("planes", [2, 1])
def test_products_are_those_of_the_dequantized_matrix(name: str, planes: int) -> None:
    matrix = matrix_of(name, 37, 128 * 19)
    blob, x = random_pool(matrix, 1)[0], activations(7, matrix.columns)
    weights, bias = weights_of(matrix, blob)
    expected = x.double() @ weights.T + bias
    first = None
    for level in levels():
        gemv = cpu.CpuGemv(matrix, planes, level)
        product = gemv.multiply(blob, gemv.prepare(x))
        first = product if first is None else first
        assert torch.equal(product, first), "every level gives the same"
        errors = (product - expected).norm(dim=1) / expected.norm(dim=1)
        bound = 1e-5 if name in FLOAT else EIGHT_BITS if planes == 1 else BOUND
        assert errors.max() <= bound, (name, level, errors)


@pytest.mark.parametrize("name", ["hqq 2 16 8", "hqq 4 64", "int8", *FLOAT])
def test_a_range_of_rows_is_written_alone(name: str) -> None:
    matrix = matrix_of(name, 9, 384)
    blob, x = random_pool(matrix, 1)[0], activations(2, 384)
    for level in levels():
        gemv = cpu.CpuGemv(matrix, level=level)
        vectors = gemv.prepare(x)
        whole, part = gemv.multiply(blob, vectors), torch.full((2, 9), 7.0)
        gemv.multiply(blob, vectors, 3, 6, part)
        assert torch.equal(part[:, 3:6], whole[:, 3:6]) and (part[:, :3] == 7).all() and (part[:, 6:] == 7).all()
        gemv.multiply(blob, vectors, 5, 5, part)
        if name in PLAIN:
            continue
        numbers, few = gemv.unpack(blob, torch.float16), torch.full((9, 384), 7.0, dtype=torch.float16)
        gemv.unpack(blob, torch.float16, few, 3, 6)
        assert torch.equal(few[3:6], numbers[3:6]) and (few[:3] == 7).all() and (few[6:] == 7).all()


@pytest.mark.parametrize("name", ["hqq 2 16", "hqq 4 64", "hqq 8 128", "int8", "nf4"])
def test_numbers_that_are_none_zero_or_tiny(name: str) -> None:
    """A chunk of zeros, one of numbers too small for a scale, and numbers that are none, as the GPU has them."""
    matrix = matrix_of(name, 5, 384)
    blob, x = random_pool(matrix, 1)[0], activations(4, 384)
    x[0], x[1, :64], x[1, 64:128] = 0.0, 0.0, 1e-35
    x[2, 77], x[3, 200] = float("nan"), float("inf")
    expected = emulated(matrix, blob, x)
    for level in levels():
        gemv = cpu.CpuGemv(matrix, level=level)
        product = gemv.multiply(blob, gemv.prepare(x))
        assert (product[0] == 0).all() and not product[2:].isfinite().any()
        if name != "nf4":
            assert torch.equal(product[:2], expected[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["hqq 2 16", "hqq 2 64", "hqq 3 64", "hqq 4 64", "hqq 8 64"])
def test_activations_are_the_gpus_in_another_order(name: str, dtype: torch.dtype) -> None:
    columns = 128 * 19
    matrix = matrix_of(name, 4, columns)
    x = activations(3, columns).to(dtype)
    theirs = Gemv(emulator.EmulatedLauncher(), matrix, CPU)
    form, pieces = theirs._format, theirs.prepare(x)
    ours = cpu.CpuGemv(matrix).prepare(x)
    chunks, fields = columns // form.chunk, 8 // (2 if form.bits == 3 else form.bits)
    blocks = -(-chunks // 16)
    # Their pieces [rows, 32 chunks, pieces, chunk, 16 bytes]: a word's high bytes come before its low ones.
    padded = pieces.pieces.view(torch.int8).view(3, -1, form.vectors, 32, 16).transpose(2, 3)
    their_numbers = padded.reshape(3, -1, 4, 2, fields, 4)[:, :chunks]  # [rows, chunk, word, plane, field, byte]
    order = torch.tensor([16 * b + 4 * (lane % 4) + lane // 4 for b in range(blocks) for lane in range(16)])
    there = order < chunks
    found = ours.numbers.view(torch.int8).view(3, blocks, 4, fields, 2, 16, 4).permute(0, 1, 5, 2, 4, 3, 6)
    found = found.reshape(3, blocks * 16, 4, 2, fields, 4)
    assert torch.equal(found[:, there], their_numbers[:, order[there]]) and (found[:, ~there] == 0).all()
    assert torch.equal(ours.scales[:, there], pieces.scales[:, order[there]]) and (ours.scales[:, ~there] == 0).all()
    sums = ours.sums.view(3, blocks, form.units, 16).transpose(2, 3).reshape(3, -1, form.units)
    assert torch.equal(sums[:, there], pieces.sums.view(3, chunks, form.units)[:, order[there]])


@pytest.mark.parametrize("name", PACKED)
def test_unpacked_is_dequantized_bit_for_bit(name: str) -> None:
    matrix = matrix_of(name, 5, 128 * 19)
    blob = random_pool(matrix, 1)[0]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        expected = dequantize(matrix, parts_of(matrix, blob), dtype)
        for level in levels():
            assert torch.equal(cpu.CpuGemv(matrix, level=level).unpack(blob, dtype), expected), (name, dtype, level)


@pytest.mark.parametrize("name", ["hqq 2 16", "hqq 3 64", "hqq 4 128", "hqq 8 64 8", "int8", *FLOAT])
def test_nothing_behind_a_blob_is_read(name: str) -> None:
    """The blob ends where its page does, and the next page may not be touched: a wrong read ends the process."""
    matrix = matrix_of(name, 3, 384)
    end = max(s.offset + s.nbytes for s in matrix.segments)
    blob = random_pool(matrix, 1)[0][:end]
    with guarded(end) as memory:
        memory.copy_(blob)
        for level in levels():
            gemv = cpu.CpuGemv(matrix, level=level)
            for x in (gemv.prepare(activations(1, 384)), gemv.prepare(activations(4, 384))):
                assert torch.equal(gemv.multiply(memory, x), gemv.multiply(blob, x))
            if name not in PLAIN:
                assert torch.equal(gemv.unpack(memory, torch.float32), gemv.unpack(blob, torch.float32))


@pytest.mark.parametrize("name", ["hqq 2 16", "hqq 2 64", "hqq 8 64", "nf4"])
def test_scales_that_are_none_spoil_their_row_alone(name: str) -> None:
    """A row's last block is read with what lies behind it, the next row's begin."""
    matrix = matrix_of(name, 40, 192 if name == "nf4" else 384)
    blob, x = random_pool(matrix, 1)[0], activations(3, matrix.columns)
    for level in levels():
        gemv = cpu.CpuGemv(matrix, level=level)
        group, nbytes = gemv.struct.group, 2 if name == "nf4" else 4
        row = matrix.columns // group * nbytes
        spoilt = blob.clone()
        spoilt[gemv.struct.scales + 7 * row : gemv.struct.scales + 8 * row] = 0xFF
        product, expected = (gemv.multiply(b, gemv.prepare(x)) for b in (spoilt, blob))
        assert product[:, 7].isnan().all()
        product[:, 7] = expected[:, 7]
        assert torch.equal(product, expected), (name, level)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_plain_numbers_of_every_size_and_a_bias(dtype: str) -> None:
    """Every 16 bits that are a number meet a 1 alone: what comes out is that number."""
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    numbers = codes.view(getattr(torch, dtype)).float()
    matrix = packed_matrix("m", (1 << 16) // 32, 32, DenseScheme(), dtype, bias=True)
    blob = torch.zeros(max(s.offset + s.nbytes for s in matrix.segments), dtype=torch.uint8)
    parts = parts_of(matrix, blob)
    parts["dense"].copy_(torch.where(numbers.isfinite(), numbers, 0.0).view(-1, 32))
    parts["bias"].copy_(torch.randn(matrix.rows))
    expected = parts["dense"].float().T + parts["bias"]  # [32, N]
    for level in levels():
        gemv = cpu.CpuGemv(matrix, level=level)
        assert torch.equal(gemv.multiply(blob, gemv.prepare(torch.eye(32))), expected), level


def test_what_cannot_be_multiplied() -> None:
    assert cpu.unsupported(matrix_of("none float32", 4, 64))
    assert cpu.unsupported(matrix_of("none bfloat16", 4, 48))
    assert cpu.unsupported(matrix_of("hqq 2 16", 4, 96))
    with pytest.raises(DeviceError, match="no CPU kernel"):
        cpu.CpuGemv(matrix_of("hqq 4 64", 4, 64), level=4)
