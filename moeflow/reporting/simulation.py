"""A replay of routes as text: hit rates by k and policy beside the optimum, what guesses were worth, and how fast."""

from __future__ import annotations

import json

from moeflow.reporting.cells import MISSING, ROUTING, Grid, digits, fill, percent
from moeflow.reporting.text import aligned
from moeflow.schema import SimulatedRow, Simulation

__all__ = ["guessed", "json_line", "remarks", "subject", "table"]

WIDTH = 120


def table(found: Simulation, by_layer: bool = False) -> str:
    """For a terminal; ends with a newline. `by_layer` adds a table of every policy's layers."""
    lines = [*fill(f"{subject(found)}.", WIDTH), *([f"guesses: {guessed(found)}"] if found.guessing else [])]
    for grid in [_rates(found), *_guesses(found), *_shared(found), *(_layers(found) if by_layer else ())]:
        lines += ["", *aligned(grid)]
    lines += ["", *_quotas(found)]
    for remark in remarks(found):
        lines += fill(remark, WIDTH)
    return "\n".join(lines) + "\n"


def json_line(found: Simulation) -> str:
    """The document on one line, with the shares of its rows under `derived`, and what must be known of them under
    `remarks`; without these keys it parses back."""
    derived = [
        {
            "hit_rate": found.hit_rate(row),
            "layer_hit_rates": found.layer_hit_rates(row),
            "foreseen": found.foreseen(row),
            "wasted": found.wasted(row),
        }
        for row in found.rows
    ]
    return json.dumps({**found.to_dict(), "derived": derived, "remarks": remarks(found)}, ensure_ascii=False)


def subject(found: Simulation) -> str:
    """Whose routes, and how many."""
    seed = "" if found.routing == "recorded" else f", seed {found.seed}"
    return (
        f"{found.model}: {found.layers} layers, top-{found.top_k} of {found.experts} experts; {ROUTING[found.routing]}"
        f"{seed}, {found.tokens:,} tokens from an empty cache"
    )


def guessed(found: Simulation) -> str:
    """What is guessed, and how; empty where nothing is."""
    asked = found.guessing
    if asked is None:
        return ""
    how = "what the token before used" if asked.recall is None else f"{percent(asked.recall)} of them right"
    ahead = "the next layer" if asked.depth == 1 else f"each of the next {asked.depth} layers"
    return f"{asked.experts} for {ahead}, {how}; {asked.staging} landing buffers"


def remarks(found: Simulation, speeds: bool = True) -> list[str]:
    """What a reader must know of the figures, and how fast they were found."""
    fitted = found.fit or "these routes themselves"
    lines = ["optimum: Belady's, the most hits of any policy with k slots a layer that keeps only what was used"]
    if any(row.policy == "static" for row in found.rows):
        lines.append(f"static: the experts most used in {fitted}")
    if any(row.quotas is not None for row in found.rows):
        lines.append(f"quotas: k slots a layer on average, shared out by hits in {fitted}; the optimum's by its own")
    if found.guessing:
        lines.append("foreseen: of the uses that were no hits, those whose expert a guess had brought")
    if found.guessing and found.guessing.recall is not None:
        lines.append(
            "guesses are forced: routes have no hidden states, so the next layer's gate cannot be asked; "
            "a recall stands for it"
        )
    if speeds and found.timings:
        rates = ", ".join(f"{t.what} {digits(t.rate / 1e6)}" for t in found.timings)
        lines.append(f"million steps a second, of one token in one layer: {rates} (the optimum's serve every k)")
    return lines


def _plain(found: Simulation) -> dict[str, dict[int, SimulatedRow]]:
    """Rows without guesses and quotas: policy -> k -> row."""
    rows: dict[str, dict[int, SimulatedRow]] = {}
    for row in found.rows:
        if row.guesses is None and row.quotas is None:
            rows.setdefault(row.label, {})[row.k] = row
    return rows


def _rates(found: Simulation) -> Grid:
    columns = _plain(found)
    headings = [text for policy in columns for text in (policy, "by layer")]
    ks = next(iter(columns.values()))
    lines = []
    for k in ks:
        cells = [f"k = {k}"]
        for rows in columns.values():
            shares = found.layer_hit_rates(rows[k])
            cells += [percent(found.hit_rate(rows[k])) or MISSING, f"{percent(min(shares))} to {percent(max(shares))}"]
        lines.append(tuple(cells))
    return Grid("hits", ("k", *headings), tuple(lines), 1)


def _guesses(found: Simulation) -> list[Grid]:
    lines = []
    for row in found.rows:
        if row.guesses is not None:
            wasted = found.wasted(row) or 0
            share = percent(wasted / row.guesses) if row.guesses else None
            lines.append(
                (f"{row.label}, k = {row.k}", percent(found.hit_rate(row)) or MISSING,
                 percent(found.foreseen(row)) or MISSING, digits(row.guesses / found.tokens) or MISSING,
                 digits(wasted / found.tokens) or MISSING, share or MISSING)
            )  # fmt: skip
    headings = ("row", "hits", "foreseen", "copies guessed, per token", "wasted, per token", "wasted")
    return [Grid("with guesses", headings, tuple(lines), 1)] if lines else []


def _shared(found: Simulation) -> list[Grid]:
    """What quotas hit beside as many slots in every layer."""
    even = _plain(found)
    lines = []
    for row in found.rows:
        if row.quotas is not None:
            shares = found.layer_hit_rates(row)
            lines.append(
                (f"{row.label}, k = {row.k}", percent(found.hit_rate(row)) or MISSING,
                 f"{percent(min(shares))} to {percent(max(shares))}",
                 percent(found.hit_rate(even[row.label][row.k])) or MISSING, f"{min(row.quotas)} to {max(row.quotas)}")
            )  # fmt: skip
    headings = ("row", "hits", "by layer", "k in every layer", "slots")
    return [Grid("with quotas", headings, tuple(lines), 1)] if lines else []


def _quotas(found: Simulation) -> list[str]:
    """Slots layer by layer; the optimum's are nobody's to copy."""
    rows = [row for row in found.rows if row.quotas is not None and row.policy != "optimum"]
    texts = [f"quotas of {row.label}, k = {row.k}: {' '.join(map(str, row.quotas or ()))}" for row in rows]
    return [line for text in texts for line in fill(text, WIDTH)] + ([""] if texts else [])


def _layers(found: Simulation) -> list[Grid]:
    grids = []
    for policy, rows in _plain(found).items():
        shares = [found.layer_hit_rates(row) for row in rows.values()]
        lines = tuple(
            (f"layer {layer}", *(percent(share[layer]) or MISSING for share in shares)) for layer in range(found.layers)
        )
        grids.append(Grid(policy, ("layer", *(f"k = {k}" for k in rows)), lines, 1))
    return grids
