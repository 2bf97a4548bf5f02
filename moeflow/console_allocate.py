"""Allotted bits as people see them: by layer, by width, and beside the same width for all. Decides nothing."""

from __future__ import annotations

from rich.console import Console

from moeflow.console import fact_table, grid, out
from moeflow.planning.bits import Allotment, Uniform
from moeflow.schema.units import format_size

__all__ = ["show_allotment"]


def show_allotment(found: Allotment, to: Console = out) -> None:
    """What was chosen, and what it gains."""
    rows = [
        (str(layer), *(f"{bits:.2f}" for bits in (own.min(), own.mean(), own.max())))
        for layer, own in zip(found.blobs.layers, found.layer_bits, strict=True)
    ]
    grid(to, "bits a weight by layer", ("layer", "least", "mean", "most"), rows)
    shares = [(scheme.label, f"{share:.1%}") for scheme, share in found.shares.items()]
    grid(to, "experts by width", ("scheme", "share"), shares)
    chosen = ("chosen", f"{found.bits:.3f}", format_size(found.nbytes), f"{found.error:.4f}", "")
    grid(
        to,
        "beside the same width for all",
        ("experts", "bits a weight", "bytes", "relative error", "squares beside chosen"),
        [chosen, *(_row(row, found.error) for row in found.uniform)],
    )
    facts = [
        ("budget", f"{found.budget:g} bits a weight: {found.bits:.3f} used"),
        ("errors of", found.measured),
        ("bound", f"no choice within the budget has a relative error below {found.bound:.4f}"),
    ]
    fact_table(to, "", facts)


def _row(row: Uniform, error: float) -> tuple[str, ...]:
    beside = f"{(row.error / error) ** 2:.3f} times" if error else ""
    return row.scheme.label, f"{row.bits:.3f}", format_size(row.nbytes), f"{row.error:.4f}", beside
