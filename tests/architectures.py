"""The GPU architectures that moeflow serves, and which of them a kernel is compiled for where forms are many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

__all__ = ["ARCHITECTURES", "spread"]

ARCHITECTURES = (75, 80, 86, 89, 90)
ALIKE = (80, 86, 89)  # sources ask whether it is before 80, or from 90 on: these compile the same text

Form = TypeVar("Form")


def spread(forms: Iterable[Form]) -> list[tuple[int, Form]]:
    """Each form with the oldest architecture, the newest, and in turn one of those that compile the same text."""
    return [(arch, form) for i, form in enumerate(forms) for arch in (75, ALIKE[i % len(ALIKE)], 90)]
