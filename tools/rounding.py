"""hqq's search for scales and zeros against plain rounding to the nearest step, at equal bits: what it is worth.

    PYTHONPATH=. python tools/rounding.py --model mid-8x2 --text heldout.txt

All experts under one scheme; attention stays unquantized. Plain rounding is the hqq library's own start, from the least
to the greatest of each group, before its optimizer moves the zeros: so codes, scales and zeros take the same bytes.
Both are packed and read back as an artifact would be. Prints, per scheme, perplexity and KL from the unquantized model,
and the weights' relative error. In transformers' own model, all in memory: a tool for small models.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from bit_criteria import Subject, under
from hqq.core.quantize import Quantizer
from torch import Tensor

from moeflow.artifact.hub import resolve_model
from moeflow.planning.blobs import SCHEMES
from moeflow.quantization.base import Codes
from moeflow.schema import HqqScheme
from moeflow.text import TextCodec


class Rounding:
    """A quantizer that puts each group's steps from its least to its greatest weight, and rounds."""

    def __init__(self, scheme: HqqScheme):
        self.scheme = scheme

    def quantize(self, weight: Tensor) -> Codes:
        """`weight` [N, K]; K is a multiple of the group size."""
        bits, group = self.scheme.bits, self.scheme.group_size
        codes, meta = Quantizer.quantize(
            weight.float(), nbits=bits, group_size=group, axis=1, bitpack=False, optimize=False, device="cpu"
        )
        pair = torch.stack([meta[name].view(len(weight), -1) for name in ("scale", "zero")], dim=-1)  # [N, G, 2]
        return Codes(codes.view(weight.shape).to(torch.uint8), {"scales": pair.to(torch.float16)})


def report(subject: Subject, windows: Tensor, schemes: list[HqqScheme]) -> None:
    """Print a line for each scheme and quantizer."""
    base = subject.log_probabilities(windows)
    whole = sum(float(own.square().sum()) for own in subject.plain)
    print(f"unquantized: perplexity {_perplexity(base, windows):.2f}", flush=True)
    for scheme in schemes:
        for name, quantizer in (("hqq", None), ("nearest", Rounding(scheme))):
            weights = under(subject.plain, scheme, quantizer)
            squares = sum(float((a - b).square().sum()) for a, b in zip(weights, subject.plain, strict=True))
            subject.put(weights)
            now = subject.log_probabilities(windows)
            kl = sum(float((b.exp() * (b - n)).sum()) for b, n in zip(base, now, strict=True)) / base[..., 0].numel()
            agreed = float((base.argmax(-1) == now.argmax(-1)).double().mean())
            error = math.sqrt(squares / whole)
            print(
                f"{scheme.label} {name}: perplexity {_perplexity(now, windows):.2f}, KL {kl:.4f}, "
                f"same top token {agreed:.1%}, relative error of weights {error:.4f}",
                flush=True,
            )


def _perplexity(log_probabilities: Tensor, windows: Tensor) -> float:
    return math.exp(-float(log_probabilities.gather(-1, windows[:, 1:, None]).double().mean()))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text that is evaluated, in windows of --context")
    parser.add_argument("--model", default="demo", help="a checkpoint in transformers' layout")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, help="of the text's beginning")
    asked = parser.parse_args()
    directory = resolve_model(asked.model)
    ids = torch.tensor(TextCodec(directory).encode(asked.text.read_text())[: asked.tokens])
    windows = ids[: len(ids) // asked.context * asked.context].view(-1, asked.context)
    report(Subject(directory, windows[:1, :2]), windows, [SCHEMES[name] for name in ("2", "3", "4")])


if __name__ == "__main__":
    main()
