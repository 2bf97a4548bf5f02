"""Packed words against an oracle that sets one bit at a time."""

from __future__ import annotations

import random

import pytest
import torch

from moeflow.kernels.packing import pack, unpack

BITS = (2, 3, 4, 8)


def _seeded() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


def _random_codes(draw: random.Random, bits: int, rows: int, columns: int) -> list[list[int]]:
    return [[draw.randrange(1 << bits) for _ in range(columns)] for _ in range(rows)]


def _words_bit_by_bit(row: list[int], bits: int) -> list[int]:
    """Field i of a row takes the bits from `i * bits` on, lowest first; words are signed 32-bit integers."""
    stream = 0
    for column, code in enumerate(row):
        for bit in range(bits):
            if code >> bit & 1:
                stream |= 1 << (column * bits + bit)
    words = [stream >> start & 0xFFFFFFFF for start in range(0, len(row) * bits, 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_are_those_of_the_bitwise_oracle(bits: int) -> None:
    draw = _seeded()
    codes = _random_codes(draw, bits, rows=5, columns=32 * draw.randrange(1, 6))
    words, high = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert high is None
    assert words.dtype == torch.int32
    assert words.tolist() == [_words_bit_by_bit(row, bits) for row in codes]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    draw = _seeded()
    codes = _random_codes(draw, 3, rows=5, columns=32 * draw.randrange(1, 6))
    words, high = pack(torch.tensor(codes, dtype=torch.uint8), 3)
    assert high is not None
    assert words.tolist() == [_words_bit_by_bit([code & 3 for code in row], 2) for row in codes]
    third = [[(code >> 2) & 1 for code in row] for row in codes]
    place = {8 * (c % 16 // 4) + 4 * (c // 16) + c % 4: c for c in range(32)}  # bit -> column, as the docstring says
    ordered = [[row[start + place[bit]] for start in range(0, len(row), 32) for bit in range(32)] for row in third]
    assert high.tolist() == [_words_bit_by_bit(row, 1) for row in ordered]


@pytest.mark.parametrize("bits", BITS)
def test_a_code_takes_exactly_its_bits(bits: int) -> None:
    words, high = pack(torch.zeros(3, 128, dtype=torch.uint8), bits)
    stored = words.numel() + (0 if high is None else high.numel())
    assert stored * 32 == 3 * 128 * bits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_unpacking_undoes_packing(bits: int, dtype: torch.dtype) -> None:
    draw = _seeded()
    for rows, columns in ((1, 32), (7, 32 * draw.randrange(1, 9)), (64, 256)):
        codes = torch.tensor(_random_codes(draw, bits, rows, columns), dtype=dtype)
        restored = unpack(*pack(codes, bits), bits)
        assert restored.dtype == torch.int32
        assert torch.equal(restored, codes.int())


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_code_everywhere_survives_the_sign_bit(bits: int) -> None:
    codes = torch.full((2, 64), (1 << bits) - 1, dtype=torch.uint8)
    words, high = pack(codes, bits)
    assert words.eq(-1).all()
    assert torch.equal(unpack(words, high, bits), codes.int())


@pytest.mark.parametrize("bits", BITS)
def test_every_field_is_independent_of_its_neighbours(bits: int) -> None:
    for column in range(64):
        codes = torch.zeros(1, 64, dtype=torch.uint8)
        codes[0, column] = (1 << bits) - 1
        assert unpack(*pack(codes, bits), bits).nonzero().tolist() == [[0, column]]


@pytest.mark.parametrize("bits", BITS)
def test_packing_does_not_change_its_argument(bits: int) -> None:
    codes = torch.full((2, 32), 1, dtype=torch.int32)
    pack(codes, bits)
    assert codes.eq(1).all()
