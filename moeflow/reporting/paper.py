"""What the paper measured (arXiv 2312.17238, table 2), to stand beside figures that can be compared with it."""

from __future__ import annotations

import re

from moeflow.schema import BenchmarkRow
from moeflow.schema.profile import Strategy

__all__ = ["A100", "K", "MEASURED", "ROWS", "paper_speed"]

ROWS: dict[Strategy, str] = {
    "full": "full algorithm",
    "no-prefetch": "w/o expert pre-loading",
    "no-cache": "w/o LRU cache and pre-loading",
    "naive": "naive offloading",
}
"""The paper's names of the ablation's rows."""

MEASURED: dict[int, dict[str, dict[Strategy, float]]] = {
    2: {
        "a100-80gb": {"full": 3.061, "no-prefetch": 2.918, "no-cache": 2.265, "naive": 1.392},
        "rtx-3080-mobile": {"full": 2.655, "no-prefetch": 2.227, "no-cache": 1.758, "naive": 1.059},
        "rtx-3060": {"full": 2.278, "no-prefetch": 2.051, "no-cache": 1.547, "naive": 0.919},
        "t4": {"full": 2.092, "no-prefetch": 1.567, "no-cache": 1.168, "naive": 0.661},
    },
    3: {
        "a100-80gb": {"full": 2.845, "no-prefetch": 2.683, "no-cache": 2.055, "naive": 1.246},
        "rtx-3080-mobile": {"full": 2.475, "no-prefetch": 2.024, "no-cache": 1.595, "naive": 0.914},
        "rtx-3060": {"full": 2.038, "no-prefetch": 1.857, "no-cache": 1.346},
        "t4": {"full": 1.603, "no-prefetch": 1.365, "no-cache": 1.061, "naive": 0.580},
    },
}
"""Bits of the experts -> machine, as its file in hardware/ is called -> row -> tokens/s of Mixtral-8x7B, batch 1, 4-bit
attention. The T4 is Colab's at 2 bits and another cloud's at 3; the 3060 has no naive row at 3."""

K: dict[str, int] = {"a100-80gb": 4, "rtx-3080-mobile": 4, "rtx-3060": 2, "t4": 4}
"""Cached experts per layer, by machine."""

A100: dict[int, dict[Strategy, float]] = {bits: machines["a100-80gb"] for bits, machines in MEASURED.items()}
"""Bits of the experts -> row -> tokens/s on an A100-80GB-SXM, k = 4."""


def paper_speed(row: BenchmarkRow) -> float | None:
    """The paper's tokens/s on an A100 for the same model, bits, row and k.

    None where it has no such figure, or the row has no speed to stand beside it.
    """
    if row.tokens_per_second is None:
        return None
    bits = re.match(r"([23])-bit\b", row.expert_scheme)
    cached = row.strategy in ("full", "no-prefetch")
    same = (
        "mixtral-8x7b" in row.model.lower()
        and row.batch == 1
        and row.experts_on in (None, "link")
        and (row.k == 4 or not cached)
    )
    return A100[int(bits[1])][row.strategy] if bits and same else None
