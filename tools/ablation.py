"""Runs the four rows of the paper's ablation on a packed model, and prints and plots speed and traffic.

    python tools/ablation.py artifacts/quickstart --plot docs/images/ablation.png

Rows are interleaved over several rounds and the median is taken, because machines drift; absolute speeds of a CPU
mean little, the rows of one run can be compared. Fails if the rows' greedy texts differ.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import moeflow

ROWS = {
    "full": "full algorithm",
    "no-prefetch": "w/o expert pre-loading",
    "no-cache": "w/o LRU cache and pre-loading",
    "naive": "naive offloading",
}
PAPER = {"full": 3.061, "no-prefetch": 2.918, "no-cache": 2.265, "naive": 1.392}  # table 2, A100, 2-bit Mixtral-8x7B
PROMPTS = ("In the beginning", "The king said", "It was a fine morning, and Elizabeth")


def measure(artifact: Path, k: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    engines = {row: moeflow.load(artifact, execution="host", strategy=row, experts_per_layer=k) for row in ROWS}
    runs: dict[str, list[moeflow.Generation]] = {row: [] for row in ROWS}
    for number in range(rounds + 1):
        for prompt in PROMPTS:
            answers = {r: e.generate(prompt, max_new_tokens=tokens, temperature=0) for r, e in engines.items()}
            assert len({answer.ids for answer in answers.values()}) == 1, f"rows differ on {prompt!r}"
            if number:  # the first round warms up
                for row, answer in answers.items():
                    runs[row].append(answer)
    for engine in engines.values():
        engine.close()
    return {row: summary(generations) for row, generations in runs.items()}


def summary(generations: list[moeflow.Generation]) -> dict[str, float]:
    decode = [g.stats.decode for g in generations]
    guesses = sum(d.guesses for d in decode)
    uses = sum(d.uses for d in decode)
    return {
        "tokens_per_second": statistics.median(g.stats.tokens_per_second for g in generations),
        "hit_rate": sum(d.hits for d in decode) / uses if uses else 0.0,
        "waits": sum(d.misses for d in decode) / uses if uses else math.nan,  # whole layers: no single use is counted
        "guesses_used": sum(d.guesses_used for d in decode) / guesses if guesses else 0.0,
        "kib_per_token": statistics.mean(g.stats.bytes_per_token for g in generations) / 1024,
    }


def show(found: dict[str, dict[str, float]]) -> None:
    print(f"{'row':<32}{'tokens/s':>9}{'hits':>7}{'waits':>7}{'guesses used':>14}{'KiB/token':>11}{'paper':>7}")
    for row, title in ROWS.items():
        r = found[row]
        print(
            f"{title:<32}{r['tokens_per_second']:>9.1f}{r['hit_rate']:>7.0%}{r['waits']:>7.0%}"
            f"{r['guesses_used']:>14.0%}{r['kib_per_token']:>11.0f}{PAPER[row]:>7.2f}"
        )


def plot(found: dict[str, dict[str, float]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10, 2.6), sharey=True, layout="constrained")
    names = list(ROWS.values())[::-1]
    columns = (("kib_per_token", "KiB moved per token"), ("waits", "expert uses that wait for a copy, %"),
               ("tokens_per_second", "tokens/s"))  # fmt: skip
    for panel, (key, label) in zip(panels, columns, strict=True):
        values = [found[row][key] * (100 if key == "waits" else 1) for row in ROWS][::-1]
        known = [0 if math.isnan(value) else value for value in values]
        bars = panel.barh(names, known, color=["#9aa5b1", "#7b8794", "#5b8db8", "#1f5f99"])
        labels = ["whole layers" if math.isnan(value) else f"{value:,.0f}" for value in values]
        panel.bar_label(bars, labels, padding=3)
        panel.set_xlabel(label)
        panel.set_xlim(0, max(known) * 1.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-k", type=int, default=4, help="cached experts per layer")
    parser.add_argument("-n", "--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.artifact, arguments.k, arguments.tokens, arguments.rounds)
    show(found)
    if arguments.plot:
        plot(found, f"Demo model, k = {arguments.k} of 8, greedy, same text in every row", arguments.plot)
    print(json.dumps(found).replace("NaN", "null"))


if __name__ == "__main__":
    main()
