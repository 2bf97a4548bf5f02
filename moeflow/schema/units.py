"""Sizes and rates as people write them: `11GiB`, `24 GB`, `12.5GB/s`, or `auto`.

In memory they are whole bytes, or bytes a second. Written back, a value that is exactly so many GiB, MiB or
KiB (GB or MB a second for rates) is written so.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, PlainSerializer, TypeAdapter, ValidationError, WithJsonSchema

__all__ = ["Size", "Rate", "Auto", "AutoSize", "AutoCount", "format_size", "format_rate"]

Auto = Literal["auto"]

_BYTES = TypeAdapter(ByteSize)
_SIZE_STEPS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def _to_bytes(value: Any, example: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a size such as {example}")
    try:
        size = int(_BYTES.validate_python(value))
    except ValidationError:
        raise ValueError(f"expected a size such as {example}") from None
    if size < 0:
        raise ValueError("a size cannot be negative")
    return size


def _parse_size(value: Any) -> int:
    return _to_bytes(value, "11GiB, 512 MiB or 4000000000")


def _parse_auto_size(value: Any) -> int | str:
    return "auto" if value == "auto" else _to_bytes(value, "11GiB or 512 MiB, or auto")


def _parse_rate(value: Any) -> int:
    if isinstance(value, str):
        if not value.rstrip().endswith("/s"):
            raise ValueError("expected a rate such as 12.5GB/s")
        value = value.rstrip()[:-2]
    return _to_bytes(value, "12.5GB/s")


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
    return f"{value / 1e9:g}GB/s" if value % 10_000_000 == 0 and value else value


def format_size(size: float) -> str:
    """`size` bytes for people, to three digits: `1.95 GiB`."""
    for unit, step in _SIZE_STEPS:
        if abs(size) >= step:
            return f"{size / step:.3g} {unit}" if size / step < 1000 else f"{size / step:,.0f} {unit}"
    return f"{size:.0f} B"


def format_rate(rate: float) -> str:
    """`rate` bytes a second for people, in the decimal units that links are sold by: `12.3 GB/s`."""
    return f"{rate / 1e9:.3g} GB/s"


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
AutoCount = Annotated[int | Auto, BeforeValidator(_parse_auto_count), Field(examples=["auto", 4])]
