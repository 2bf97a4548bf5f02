"""What the paper measured (arXiv 2312.17238, table 2), to stand beside figures that can be compared with it."""

from __future__ import annotations

import re

from moeflow.schema import BenchmarkRow
from moeflow.schema.profile import Strategy

__all__ = ["ROWS", "A100", "paper_speed"]

ROWS: dict[Strategy, str] = {
    "full": "full algorithm",
    "no-prefetch": "w/o expert pre-loading",
    "no-cache": "w/o LRU cache and pre-loading",
    "naive": "naive offloading",
}
"""The paper's names of the ablation's rows."""

A100: dict[int, dict[Strategy, float]] = {
    2: {"full": 3.061, "no-prefetch": 2.918, "no-cache": 2.265, "naive": 1.392},
    3: {"full": 2.845, "no-prefetch": 2.683, "no-cache": 2.055, "naive": 1.246},
}
"""Bits of the experts -> row -> tokens/s of Mixtral-8x7B on an A100-80GB-SXM, k = 4, 4-bit attention, batch 1."""


def paper_speed(row: BenchmarkRow) -> float | None:
    """The paper's tokens/s on an A100 for the same model, bits, row and k.

    None where it has no such figure, or the row has no speed to stand beside it.
    """
    if row.tokens_per_second is None:
        return None
    bits = re.match(r"([23])-bit\b", row.expert_scheme)
    cached = row.strategy in ("full", "no-prefetch")
    same = "mixtral-8x7b" in row.model.lower() and row.batch == 1 and (row.k == 4 or not cached)
    return A100[int(bits[1])][row.strategy] if bits and same else None
