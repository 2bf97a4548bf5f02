"""The paper's Figure 2 of a packed model: hits by size of the cache, right guesses by how many were made and how early.

    python tools/figure2.py artifacts/mid-8x2 --text heldout.txt --json found.json --plot found.png

What: reads a text through a model that has a predictor, and counts. Left, the share of uses that find their expert in
a cache of k a layer. Right, the share of a token's experts among the n likeliest that were guessed 1, 2 and 10 layers
before, by the coming layer's own gate and by the learned maps; layers that nothing so far before can guess are not in
the mean.
What it does not do: measure a time, or play guesses and cache together; `moeflow bench` and `simulate` do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moeflow
from moeflow.artifact.predictors import load_predictor
from moeflow.files import read_text, write_json
from moeflow.learning.training import judged
from moeflow.offload.policy import Rule
from moeflow.planning.simulator import hit_rates, thinned
from moeflow.recording import text_ids
from moeflow.reporting.picture import FAINT, INK, OURS, check, framed, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AHEAD = {1: OURS, 2: "#3b7a57", 10: "#b5651d"}
MIX = Rule("mix")
POLICIES = {
    "lru": (OURS, "-"), MIX.label: ("#3b7a57", "-"), "learned": ("#b5651d", "--"), "optimum": (FAINT, ":"),
}  # fmt: skip
HIGH, GAP = 3.4, 0.09  # inches; of the width


def measure(path: Path, text: Path, tokens: int | None) -> dict[str, Any]:
    with moeflow.load(path, record_routes=True, execution="host", policy="lru", predictor="none") as engine:
        card, matrices = load_predictor(engine.artifact)
        if len(set(card.experts)) > 1:
            raise SystemExit(f"{path}: its layers have different numbers of experts, so they share no k")
        experts, ids = card.experts[0], text_ids(engine, read_text(text), tokens)
        judge = judged(engine, matrices, ids, range(1, experts + 1), progress=_tell)
        top_k = engine.artifact.manifest.model.top_k
    ks = [*thinned(experts), experts]
    mixed = hit_rates(judge.routes(), experts, MIX, ks).mean(axis=0).round(4).tolist()
    hits = zip(judge.hits(ks), mixed, strict=True)
    return {
        "model": card.model, "layers": len(card.experts), "experts": experts, "top_k": top_k,
        "tokens": len(ids), "fitted_tokens": card.tokens,
        "hits": [{"k": h.k, "lru": h.lru, MIX.label: mix, "learned": h.learned, "optimum": h.optimum}
                 for h, mix in hits],
        "recalls": [
            {"ahead": r.depth, "fetched": r.fetched, "gate": r.gate, "learned": r.learned,
             "chance": round(r.fetched / experts, 4)}
            for r in judge.recalls() if r.depth in AHEAD
        ],
    }  # fmt: skip


def _tell(what: str, done: int, total: int) -> None:
    print(f"{what}: {done:,} of {total:,}", end="\n" if done == total else "\r", file=sys.stderr, flush=True)


def draw(found: dict[str, Any], command: str) -> Figure:
    about = (
        f"{found['model']}: {found['layers']} layers, {found['top_k']} of {found['experts']} experts a token; "
        f"{found['tokens']:,} tokens of text, learned maps fitted to {found['fitted_tokens']:,} others.",
        "Caches begin empty. Optimum: Belady's. Recall is the mean over the layers that have one so far before them.",
    )
    title = f"Figure 2 again, {found['model']}: hits of a cache, and right guesses"
    figure, left = framed(title, about, command, HIGH)
    place = left.get_position()
    wide = (place.width - GAP) / 2
    left.set_position((place.x0, place.y0, wide, place.height))
    right = figure.add_axes((place.x0 + wide + GAP, place.y0, wide, place.height))
    right.spines[["top", "right"]].set_visible(False)
    _hits(left, found)
    _recalls(right, found)
    return figure


def _hits(axes: Axes, found: dict[str, Any]) -> None:
    ks = [row["k"] for row in found["hits"]]
    for name, (color, style) in POLICIES.items():
        rates = [100 * row[name] for row in found["hits"]]
        axes.plot(ks, rates, color=color, linestyle=style, marker="o", markersize=3, label=name)
    _finish(axes, f"k, experts cached per layer, of {found['experts']}", "hits, %")


def _recalls(axes: Axes, found: dict[str, Any]) -> None:
    for ahead, color in AHEAD.items():
        rows = [row for row in found["recalls"] if row["ahead"] == ahead]
        for who, name, style in (("gate", "gate", "-"), ("learned", "learned", "--")):
            points = [(row["fetched"], 100 * row[who]) for row in rows if row[who] is not None]
            if points:
                layers = "1 layer" if ahead == 1 else f"{ahead} layers"
                axes.plot(*zip(*points, strict=True), color=color, linestyle=style, label=f"{layers}, {name}")
    ends = [1, found["experts"]]
    axes.plot(ends, [100 * n / found["experts"] for n in ends], color=FAINT, linestyle=":", label="chance")
    _finish(axes, f"experts fetched, of {found['experts']}", "recall, %")


def _finish(axes: Axes, across: str, up: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.set_ylim(0, 102)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=FAINT, alpha=0.2)
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def shrink(path: Path) -> None:
    """To a palette: a third of the bytes, and nothing that an eye would miss in lines and letters."""
    from PIL import Image

    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="with a predictor; for 10 layers ahead, one of --depth 10")
    parser.add_argument("--text", type=Path, required=True, help="that the predictor was not fitted to")
    parser.add_argument("-n", "--tokens", type=int, help="only the first so many")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.plot:
        check(given.plot)
    command = " ".join(["python", *sys.argv])
    found = {"command": command, **measure(given.artifact, given.text, given.tokens)}
    write_json(given.json, found)
    if given.plot:
        save(given.plot, lambda: draw(found, command))
        shrink(given.plot)


if __name__ == "__main__":
    main()
