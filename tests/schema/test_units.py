"""Sizes and rates: what people write, what they meant, and what is written back."""

from __future__ import annotations

import random

import pytest
from pydantic import TypeAdapter, ValidationError

from moeflow.schema.units import AutoCount, AutoSize, Rate, Size, format_rate, format_size

SIZE, RATE, AUTO_SIZE, AUTO_COUNT = map(TypeAdapter, (Size, Rate, AutoSize, AutoCount))
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("11GiB", 11 * GIB),
        ("512 MiB", 512 * MIB),
        ("1KiB", KIB),
        ("24 GB", 24 * 10**9),
        ("24gb", 24 * 10**9),
        ("1.5GiB", 3 * GIB // 2),
        ("0.1GB", 10**8),
        (" 1GiB ", GIB),
        ("7", 7),
        (4_000_000_000, 4_000_000_000),
        (0, 0),
        ("2TiB", 1 << 41),
    ],
)
def test_a_size_is_read_as_meant(text: str | int, size: int) -> None:
    assert SIZE.validate_python(text) == size
    assert AUTO_SIZE.validate_python(text) == size


NONSENSE = [
    "", " ", "GiB", "lots", "-1GiB", -1, "11 potatoes", "1e400GiB", "inf", "nan", float("inf"), float("nan"), True,
    None, [1], {}, "1,5GiB", "24,000MiB", "11GiB of it", "1.2.3GiB", "1 1GiB",
]  # fmt: skip


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
@pytest.mark.parametrize("adapter", [SIZE, AUTO_SIZE], ids=["size", "auto-size"])
def test_nonsense_is_no_size(adapter: TypeAdapter, value: object) -> None:
    with pytest.raises(ValidationError, match=r"expected a size such as 11GiB|a size cannot be negative"):
        adapter.validate_python(value)


@pytest.mark.parametrize("value", ["auto", "Auto", "max"])
def test_a_size_that_must_be_known_is_not_auto(value: str) -> None:
    with pytest.raises(ValidationError, match="expected a size such as"):
        SIZE.validate_python(value)


def test_auto_stays_auto() -> None:
    for adapter in (AUTO_SIZE, AUTO_COUNT):
        assert adapter.validate_python("auto") == "auto"
        assert adapter.dump_python("auto") == "auto"


@pytest.mark.parametrize(
    ("text", "rate"),
    [("12.5GB/s", 12_500_000_000), ("12.5 GB/s ", 12_500_000_000), ("3350GB/s", 3_350 * 10**9),
     ("2.1TB/s", 2_100 * 10**9), ("1GiB/s", GIB), (5, 5)],
)  # fmt: skip
def test_a_rate_is_read_as_meant(text: str | int, rate: int) -> None:
    assert RATE.validate_python(text) == rate


@pytest.mark.parametrize(
    "value", ["12.5GB", "12.5GB/h", "/s", "GB/s", "fast", "-1GB/s", True, None, "auto", "1,5GB/s", "1.GB/s x/s"]
)
def test_nonsense_is_no_rate(value: object) -> None:
    with pytest.raises(ValidationError, match=r"expected a rate such as 12\.5GB/s"):
        RATE.validate_python(value)


@pytest.mark.parametrize("value", [0, "0GB/s"])
def test_a_rate_of_zero_is_refused_because_times_divide_by_it(value: object) -> None:
    with pytest.raises(ValidationError):
        RATE.validate_python(value)


@pytest.mark.parametrize("value", [-1, 2.0, 2.5, True, "4", "all", None, [4]], ids=repr)
def test_a_count_is_a_whole_number_or_auto(value: object) -> None:
    with pytest.raises(ValidationError, match="expected a whole number, 0 or more, or auto"):
        AUTO_COUNT.validate_python(value)


def test_every_size_comes_back_from_what_is_written() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(3000):
        size = draw.randrange(1 << draw.randrange(1, 50)) << draw.choice((0, 10, 20, 30))
        assert SIZE.validate_python(SIZE.dump_python(size)) == size


def test_every_rate_comes_back_from_what_is_written() -> None:
    """All multiples of 10 MB/s, which are written as GB/s, up to 200 GB/s, and random others."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    rates = [n * 10_000_000 for n in range(1, 20_000)]
    rates += [draw.randrange(1, 1 << draw.randrange(2, 46)) for _ in range(1000)]
    rates += [draw.randrange(1, 10**7) * 10_000_000 for _ in range(1000)]
    wrong = [r for r in rates if RATE.validate_python(RATE.dump_python(r)) != r]
    assert wrong == []


@pytest.mark.parametrize(
    ("size", "text"), [(11 * GIB, "11GiB"), (1536 * MIB, "1536MiB"), (3 * KIB, "3KiB"), (1000, 1000), (0, 0)]
)
def test_a_size_is_written_as_people_write_it(size: int, text: str | int) -> None:
    assert SIZE.dump_python(size) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(12_500_000_000, "12.5GB/s"), (3_350 * 10**9, "3350GB/s"), (123_456_789, 123_456_789)]
)
def test_a_rate_is_written_as_people_write_it(rate: int, text: str | int) -> None:
    assert RATE.dump_python(rate) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (KIB, "1 KiB"), (1.95 * GIB, "1.95 GiB"), (45.5 * MIB, "45.5 MiB"),
     (1000 * MIB, "1,000 MiB"), (999.7 * MIB, "1,000 MiB"), (3000 * GIB, "3,000 GiB")],
)  # fmt: skip
def test_sizes_are_shown_to_three_digits(size: float, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(("rate", "text"), [(12.34e9, "12.3 GB/s"), (3350e9, "3,350 GB/s"), (5e7, "0.05 GB/s")])
def test_rates_are_shown_in_decimal_units(rate: float, text: str) -> None:
    assert format_rate(rate) == text


def test_no_shown_number_is_in_powers_of_ten() -> None:
    for value in (1.1**exponent for exponent in range(360)):
        assert "e+" not in format_size(value), value
        assert "e+" not in format_rate(value), value
