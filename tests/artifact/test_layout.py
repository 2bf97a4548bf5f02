"""The packed layout: aligned, without overlap, exactly as large as it says, refused where groups do not fit."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from math import prod

import pytest

from moeflow.artifact.layout import PAGE, expert_layout, packed_matrix
from moeflow.errors import DocumentError
from moeflow.schema import BitsAndBytesScheme, BlobLayout, DenseScheme, HqqScheme, PackedMatrix, Scheme

SCHEMES: list[Scheme] = [
    *(HqqScheme(bits=b, group_size=g) for b in (2, 3, 4, 8) for g in (16, 32, 64, 128, 256)),
    *(HqqScheme(bits=b, group_size=g, metadata_bits=8) for b in (2, 3, 4, 8) for g in (16, 64, 256)),
    BitsAndBytesScheme(format="nf4"),
    BitsAndBytesScheme(format="int8"),
    DenseScheme(),
]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
ITEM = {"uint8": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


def _random_layouts(scheme: Scheme, count: int = 20) -> list[tuple[int, int, BlobLayout]]:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    sizes = [(256 * draw.randrange(1, 9), 256 * draw.randrange(1, 9)) for _ in range(count)]
    return [(hidden, inner, expert_layout(hidden, inner, scheme, "bfloat16")) for hidden, inner in sizes]


@schemes
def test_parts_are_aligned_and_do_not_overlap_and_end_in_the_blob(scheme: Scheme) -> None:
    for _, _, layout in _random_layouts(scheme):
        segments = [s for matrix in layout.matrices for s in matrix.segments]
        assert all(s.offset % 256 == 0 for s in segments)
        assert all(s.nbytes == prod(s.shape) * ITEM[s.dtype] > 0 for s in segments)
        for before, after in itertools.pairwise(segments):
            assert 0 <= after.offset - (before.offset + before.nbytes) < 256
        assert segments[0].offset == 0
        last = segments[-1]
        assert layout.nbytes % PAGE == 0
        assert 0 <= layout.nbytes - (last.offset + last.nbytes) < PAGE == 4096


@schemes
def test_a_matrix_of_odd_size_at_an_odd_place_is_aligned_all_the_same(scheme: Scheme) -> None:
    for rows, offset in itertools.product((1, 3, 33), (0, 1, 255, 257)):
        end = offset
        for segment in packed_matrix("m", rows, 256, scheme, "float16", offset).segments:
            assert segment.offset == -(-end // 256) * 256
            end = segment.offset + segment.nbytes


@schemes
def test_gate_and_up_are_one_range_before_down(scheme: Scheme) -> None:
    for hidden, inner, layout in _random_layouts(scheme, count=3):
        gate_up, down = layout.matrices
        assert (gate_up.name, gate_up.rows, gate_up.columns) == ("gate_up", 2 * inner, hidden)
        assert (down.name, down.rows, down.columns) == ("down", hidden, inner)
        ends = [s.offset + s.nbytes for s in gate_up.segments]
        assert max(ends) <= min(s.offset for s in down.segments)


def _bits_per_weight(matrix: PackedMatrix, *parts: str) -> float:
    return sum(8 * s.nbytes for s in matrix.segments if s.part in parts) / (matrix.rows * matrix.columns)


@schemes
def test_a_weight_takes_its_bits_and_a_group_its_scales(scheme: Scheme) -> None:
    matrix = packed_matrix("m", 512, 1024, scheme, "bfloat16")
    if isinstance(scheme, DenseScheme):
        assert _bits_per_weight(matrix, "dense") == 16
        return
    assert _bits_per_weight(matrix, "words", "high") == scheme.bits
    words = ["words", *(["high"] if scheme.bits == 3 else [])]
    if isinstance(scheme, BitsAndBytesScheme):
        assert _bits_per_weight(matrix, "scales") == (16 / 64 if scheme.format == "nf4" else 32 / 1024)
        assert [s.part for s in matrix.segments] == ["words", "scales"]
    elif scheme.metadata_bits == 16:
        assert _bits_per_weight(matrix, "scales") == 32 / scheme.group_size
        assert [s.part for s in matrix.segments] == [*words, "scales"]
    else:
        assert _bits_per_weight(matrix, "meta") == 16 / scheme.group_size
        assert _bits_per_weight(matrix, "meta_scales") == 128 / 1024  # one block of at most 128 groups
        assert [s.part for s in matrix.segments] == [*words, "meta", "meta_scales"]


@pytest.mark.parametrize(("columns", "blocks"), [(16, 1), (2032, 1), (2048, 1), (2064, 2), (4096, 2), (14336, 7)])
def test_every_128_groups_of_a_row_share_their_steps(columns: int, blocks: int) -> None:
    matrix = packed_matrix("m", 3, columns, HqqScheme(bits=2, group_size=16, metadata_bits=8), "bfloat16")
    shapes = {s.part: (s.dtype, s.shape) for s in matrix.segments}
    assert shapes["meta"] == ("uint8", (3, columns // 16, 2))
    assert shapes["meta_scales"] == ("float32", (3, blocks, 4))


@pytest.mark.parametrize(("dense", "item"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_unquantized_numbers_keep_the_checkpoints_dtype(dense: str, item: int) -> None:
    (segment,) = packed_matrix("m", 8, 10, DenseScheme(), dense).segments
    assert (segment.dtype, segment.shape, segment.nbytes) == (dense, (8, 10), 80 * item)


def test_mixtral_at_two_bits_takes_the_papers_size() -> None:
    """176 M weights at 2 bits, and a 16-bit scale and zero for every 16, are 84 MiB; at 64, 52.5 MiB."""
    weights = 3 * 4096 * 14336
    for group_size in (16, 64):
        layout = expert_layout(4096, 14336, HqqScheme(bits=2, group_size=group_size), "bfloat16")
        assert layout.nbytes == weights * 2 // 8 + weights // group_size * 4


def test_mixtral_with_eight_bit_scales_takes_three_bits_a_weight() -> None:
    """2 bits, 16 for every 16 weights, and 16 bytes for every 2048: 3.0625 (64.3 MiB; the paper's code 63.3)."""
    weights = 3 * 4096 * 14336
    layout = expert_layout(4096, 14336, HqqScheme(bits=2, group_size=16, metadata_bits=8), "bfloat16")
    assert layout.nbytes == weights * 3 // 8 + weights // 2048 * 16 == 67_436_544
    assert 8 * layout.nbytes / weights == 3.0625


def test_mixtral_with_bitsandbytes() -> None:
    weights = 3 * 4096 * 14336
    nf4, int8 = (expert_layout(4096, 14336, BitsAndBytesScheme(format=f), "bfloat16") for f in ("nf4", "int8"))
    assert 8 * nf4.nbytes / weights == 4.25
    assert int8.nbytes == weights + 4 * (2 * 14336 + 4096)


@pytest.mark.parametrize(
    ("columns", "bits", "group_size", "fitting"),
    [
        (96, 4, 64, "group_size 32, 16 would fit"),
        (64, 4, 128, "group_size 64, 32, 16 would fit"),
        (48, 2, 32, "group_size 16 would fit"),
        (1408, 4, 256, "group_size 128, 64, 32, 16 would fit"),
        (48, 3, 16, "use backend none"),
        (100, 8, 64, "use backend none"),
    ],
)
def test_a_group_that_does_not_divide_is_refused_with_those_that_do(
    columns: int, bits: int, group_size: int, fitting: str
) -> None:
    scheme = HqqScheme.model_validate({"bits": bits, "group_size": group_size})
    with pytest.raises(DocumentError) as caught:
        packed_matrix("down", 64, columns, scheme, "bfloat16")
    assert str(caught.value).startswith(f"down has {columns} inputs, not a multiple of ")
    assert f"({scheme.label}); {fitting}" in str(caught.value)


@pytest.mark.parametrize(
    ("form", "columns", "line"),
    [
        ("nf4", 96, "down has 96 inputs, not a multiple of 64 (nf4); format int8 would fit"),
        ("nf4", 98, "down has 98 inputs, not a multiple of 64 (nf4); use backend none"),
        ("int8", 98, "down has 98 inputs, not a multiple of 4 (int8); use backend none"),
    ],
)
def test_inputs_that_do_not_fit_bitsandbytes_are_refused_with_what_does(form: str, columns: int, line: str) -> None:
    with pytest.raises(DocumentError) as caught:
        packed_matrix("down", 64, columns, BitsAndBytesScheme(format=form), "bfloat16")
    assert str(caught.value) == line


def test_int8_fits_every_multiple_of_four() -> None:
    for columns in range(4, 100, 4):
        matrix = packed_matrix("down", 2, columns, BitsAndBytesScheme(format="int8"), "bfloat16")
        assert matrix.segments[0].shape == (2, columns // 4)


def _refusal(columns: int, bits: int, group_size: int) -> str:
    try:
        scheme = HqqScheme.model_validate({"bits": bits, "group_size": group_size})
        packed_matrix("m", 2, columns, scheme, "float16")
    except DocumentError as error:
        return str(error).partition("; ")[2]
    return ""


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exactly_the_group_sizes_told_fit(bits: int) -> None:
    for columns in range(8, 400, 8):
        outcomes = {size: _refusal(columns, bits, size) for size in (256, 128, 64, 32, 16)}
        good = [str(size) for size, refusal in outcomes.items() if not refusal]
        told = f"group_size {', '.join(good)} would fit" if good else "use backend none"
        assert set(outcomes.values()) <= {"", told}, columns


def test_layouts_are_made_without_torch() -> None:
    script = "import sys, moeflow.artifact.layout, moeflow.planning.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
