"""Sizes and rates as people write them: `11GiB`, `24 GB`, `12.5GB/s`, or `auto`.

In memory they are whole bytes, or bytes a second. Written back, a value that is exactly so many GiB, MiB or
KiB (GB or MB a second for rates) is written so.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

__all__ = ["Size", "Rate", "Spread", "Auto", "AutoSize", "AutoCount", "format_size", "format_rate", "three_digits"]

Auto = Literal["auto"]

FASTEST = 10**14
"""Bytes a second, well above any memory: a larger figure is a slipped unit."""

_SIZE_STEPS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_WRITTEN = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgtp]i?b|b)?\s*", re.IGNORECASE)


def _to_bytes(value: Any, example: str) -> int:
    """Whole bytes of a number or of text such as `1.5 GiB`; pydantic's own ByteSize would take `1,5GiB` for 5 GiB."""
    if isinstance(value, str) and (written := _WRITTEN.fullmatch(value)):
        prefix = (written["unit"] or "b").lower().removesuffix("b")
        step = (1024 if prefix.endswith("i") else 1000) ** " kmgtp".index(prefix[:1] or " ")
        return int(Decimal(written["number"]) * step)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"expected a size such as {example}")


def _parse_size(value: Any) -> int:
    return _to_bytes(value, "11GiB, 512 MiB or 4000000000")


def _parse_auto_size(value: Any) -> int | str:
    return "auto" if value == "auto" else _to_bytes(value, "11GiB or 512 MiB, or auto")


def _parse_rate(value: Any) -> int:
    text = value.rstrip() if isinstance(value, str) else value
    try:
        if isinstance(text, str) and not text.endswith("/s"):
            raise ValueError
        rate = _to_bytes(text.removesuffix("/s") if isinstance(text, str) else text, "")
    except ValueError:
        rate = 0
    if not rate:
        raise ValueError("expected a rate such as 12.5GB/s")
    if rate > FASTEST:
        raise ValueError(f"no memory is faster than {format_rate(FASTEST)}: check the unit")
    return rate


def _parse_auto_count(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("expected a whole number, 0 or more, or auto")
    return value


def _write_size(value: int | str) -> int | str:
    if isinstance(value, str) or value == 0:
        return value
    return next((f"{value // step}{unit}" for unit, step in _SIZE_STEPS if value % step == 0), value)


def _write_rate(value: int) -> int | str:
    """In GB/s where two decimals say it exactly."""
    return f"{Decimal(value) / 10**9:f}GB/s" if value % 10_000_000 == 0 else value


def three_digits(value: float) -> str:
    """`value` for people, to three digits: `1,950`, `12.3`."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def format_size(size: float) -> str:
    """`size` bytes for people, to three digits: `1.95 GiB`."""
    for unit, step in _SIZE_STEPS:
        if abs(size) >= step:
            return f"{three_digits(size / step)} {unit}"
    return f"{size:.0f} B"


def format_rate(rate: float) -> str:
    """`rate` bytes a second for people, in the decimal units that links are sold by: `12.3 GB/s`."""
    return f"{three_digits(rate / 1e9)} GB/s"


_SIZE_SCHEMA = {"type": ["string", "integer"], "examples": ["11GiB", "512MiB"]}
_AUTO_SIZE_SCHEMA = {"type": ["string", "integer"], "examples": ["auto", "11GiB"]}

Size = Annotated[int, BeforeValidator(_parse_size), PlainSerializer(_write_size), WithJsonSchema(_SIZE_SCHEMA)]
AutoSize = Annotated[
    int | Auto, BeforeValidator(_parse_auto_size), PlainSerializer(_write_size), WithJsonSchema(_AUTO_SIZE_SCHEMA)
]
Rate = Annotated[
    int,
    BeforeValidator(_parse_rate),
    PlainSerializer(_write_rate),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["12.5GB/s"]}),
]
Spread = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""How far repeats of a measurement lay apart: their interquartile range over their median."""
AutoCount = Annotated[int | Auto, BeforeValidator(_parse_auto_count), Field(examples=["auto", 4])]
