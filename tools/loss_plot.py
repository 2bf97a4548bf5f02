"""Draw losses against steps, from what train_model.py left in the training.json of one or more checkpoints.

What: `python tools/loss_plot.py mid-8x2 mid-32x4 --output docs/images/mid-loss.png`; evaluate_model.py --plot draws its
own checkpoint's. N-gram baselines of the corpus are horizontal lines, where there are any.
What it does not do: measure anything, or tell corpora apart: the baselines are the first checkpoint's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = ("tab:orange", "tab:blue", "tab:green", "tab:red")


def plot(records: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Training loss thin, held-out loss thick; `records` are training.json's, by the names of their models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110)
    for (name, record), colour in zip(records.items(), COLOURS, strict=False):
        steps = [point["step"] for point in record["curve"]]
        axes.plot(steps, [p["heldout_loss"] for p in record["curve"]], label=f"{name}, held-out", color=colour)
        trained = [p["train_loss"] for p in record["curve"]]
        axes.plot(steps, trained, label=f"{name}, training (with dropout)", color=colour, linewidth=0.8, linestyle="-.")
    baselines = next(iter(records.values()))["corpus"]["baselines"]
    for key, label, style in (("unigram", "unigram", ":"), ("kneser_ney_5gram", "Kneser-Ney 5-gram", "--")):
        if key in baselines:
            loss = baselines[key]["nats_per_token"]
            axes.axhline(loss, color="grey", linestyle=style, label=f"{label}, held-out ({loss:.2f})")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title="Loss while training")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args()
    records = {path.name: json.loads((path / "training.json").read_text()) for path in options.checkpoints}
    plot(records, options.output)


if __name__ == "__main__":
    main()
