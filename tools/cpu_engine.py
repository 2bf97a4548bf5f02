"""What a model decodes without a GPU, by torch and by the CPU's kernels, and how far their predictions lie apart.

`python tools/cpu_engine.py artifacts/demo TEXT [-n 96] [--tokens 1000] [--rounds 3]`: tokens a second of greedy
continuations, each way in turns, the best of all rounds (others may use the cores); then the KL divergence of
next-token distributions on the text, one token at a time, in nats a token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.functional import kl_div, log_softmax

import moeflow

WAYS: dict[str, dict[str, object]] = {
    "torch, k = 4": {"cpu_experts": "off", "experts_per_layer": 4},
    "fixed16, k = 4": {"experts_per_layer": 4},
    "fixed16, in place": {"experts_per_layer": 0},
    "int8, in place": {"experts_per_layer": 0, "cpu_activations": "int8"},
}
PAIRS = (("torch, k = 4", "fixed16, in place"), ("fixed16, in place", "int8, in place"))


def speed(artifact: Path, way: dict[str, object], tokens: int) -> float:
    with moeflow.load(artifact, **way) as engine:
        engine.generate("In the beginning", max_new_tokens=8, temperature=0)
        return engine.generate("In the beginning", max_new_tokens=tokens, temperature=0).stats.tokens_per_second


def predictions(artifact: Path, way: dict[str, object], ids: list[int]) -> torch.Tensor:
    """Logarithms of probabilities [T, V]."""
    with moeflow.load(artifact, **way) as engine:
        return log_softmax(engine.logits(ids, chunk=1).double(), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("-n", type=int, default=96, help="tokens of a continuation")
    parser.add_argument("--tokens", type=int, default=1000, help="of the text")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    best = dict.fromkeys(WAYS, 0.0)
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            best[name] = max(best[name], speed(options.artifact, way, options.n))
    for name, value in best.items():
        print(f"{name:<20}{value:>8.1f} tokens/s")
    with moeflow.load(options.artifact) as engine:
        ids = engine.tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"][: options.tokens]
    found = {name: predictions(options.artifact, WAYS[name], ids) for pair in PAIRS for name in pair}
    for reference, other in PAIRS:
        divergence = float(kl_div(found[other], found[reference], log_target=True, reduction="batchmean"))
        same = float((found[other].argmax(-1) == found[reference].argmax(-1)).double().mean())
        print(f"{other} from {reference}: {divergence:.2e} nats a token, the same likeliest token {same:.1%}")


if __name__ == "__main__":
    main()
