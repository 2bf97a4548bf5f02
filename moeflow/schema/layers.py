"""Layers and experts as people write them: `3`, `0-3`, `0-3,31`; numbers of the model's decoder layers, from 0, or of a
layer's experts.

What layers and experts a model has is not known here; `artifact.schemes` compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

__all__ = ["ExpertPattern", "LayerPattern", "spans", "shared", "written"]

_SPAN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def _parse(value: Any, rule: str) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str):
        raise ValueError(rule)
    text = text.replace(" ", "")
    for part in text.split(","):
        found = _SPAN.fullmatch(part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(rule)
    return text


_SCHEMA = WithJsonSchema({"type": ["string", "integer"], "pattern": r"^\s*\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*\s*$"})

LayerPattern = Annotated[
    str, BeforeValidator(partial(_parse, rule="expected layers such as 31, 0-3 or 0-3,31")), _SCHEMA
]
ExpertPattern = Annotated[
    str, BeforeValidator(partial(_parse, rule="expected experts such as 5, 0-3 or 0,5-7")), _SCHEMA
]


def spans(pattern: str) -> list[range]:
    """The pattern's runs of numbers, as written."""
    found = [part.partition("-") for part in pattern.split(",")]
    return [range(int(first), int(last or first) + 1) for first, _, last in found]


def shared(one: str, other: str) -> int | None:
    """The first number that both patterns name, or None."""
    both = [
        max(a.start, b.start) for a in spans(one) for b in spans(other) if max(a.start, b.start) < min(a.stop, b.stop)
    ]
    return min(both, default=None)


def written(numbers: Iterable[int]) -> str:
    """Numbers as a pattern: 0, 1, 2, 5 is `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
