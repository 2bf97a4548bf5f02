"""Which measure of an expert's error tells best which experts are to have more bits: perplexity by each.

    PYTHONPATH=. python tools/bit_criteria.py --calibration hamlet.txt --text twelfth-night.txt [--scaling]

Experts get 2, 3 or 4 bits (groups of 64; others by --schemes) within a budget, by each of the criteria that
docs/bit-allocation.md compares; attention stays unquantized. With --scaling instead: activation-aware scales (AWQ,
arXiv 2306.00978) and outliers kept in 16 bits, simulated on all experts at 2 and at 3 bits. Works in transformers' own
model (--model, or the demo) with restored weights, all in memory: a tool for small models, not what `moeflow allocate`
does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.hub import resolve_model
from moeflow.artifact.layout import packed_matrix
from moeflow.artifact.matrix import dequantize, encode, parts_of
from moeflow.planning.allocation import Floats, allocate
from moeflow.planning.blobs import SCHEMES, Blobs
from moeflow.quantization.base import Quantizer
from moeflow.quantization.registry import quantizer_for
from moeflow.schema import Scheme
from moeflow.text import TextCodec

WINDOW = 512
WIDTHS = [SCHEMES[name] for name in ("2", "3", "4")]
Weights = tuple[Tensor, Tensor]
"""gate and up [L, E, 2 I, H], down [L, E, H, I]."""


class Subject:
    """A model in memory, its experts' weights, and what they are given on a text."""

    def __init__(self, directory: Path, calibration: Tensor):
        self.model: Any = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
        )
        self.experts = [layer.mlp.experts for layer in self.model.model.layers]
        gate_up, down = (torch.stack([getattr(e, name).clone() for e in self.experts]) for name in NAMES)
        self.plain: Weights = (gate_up, down)
        self.calibration = calibration
        self.inputs, self.gradients, self.residuals = self._observed()

    def _observed(self) -> tuple[list[Any], list[Tensor], list[Tensor]]:
        """Per layer: hidden states, ids and weights of the router; gradients of a sampled token's loss; residuals."""
        inputs: list[Any] = []
        leaves: list[Tensor] = []
        residuals: list[Tensor] = []

        def taken(_: Any, given: Any, output: Tensor) -> Tensor:
            inputs.append([tensor.detach().flatten(0, -2) for tensor in given])
            leaves.append(torch.zeros_like(output, requires_grad=True))
            return output + leaves[-1]

        hooks = [experts.register_forward_hook(taken) for experts in self.experts]
        hooks += [
            y.register_forward_hook(lambda _, __, o: residuals.append(o.detach())) for y in self.model.model.layers
        ]
        logits = self.model(self.calibration, use_cache=False).logits.log_softmax(-1)
        torch.manual_seed(0)
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
        (-logits.gather(-1, drawn[..., None])).sum().backward()
        for hook in hooks:
            hook.remove()
        grads = [leaf.grad.flatten(0, -2) for leaf in leaves if leaf.grad is not None]
        return inputs, grads, [r.flatten(0, -2).square().sum(-1) for r in residuals]

    def put(self, weights: Weights) -> None:
        """Compute with these from now on."""
        for name, own in zip(NAMES, weights, strict=True):
            for experts, tensor in zip(self.experts, own, strict=True):
                getattr(experts, name).data.copy_(tensor)

    @torch.inference_mode()
    def log_probabilities(self, windows: Tensor) -> Tensor:
        """[B, W - 1, V], of the tokens that follow."""
        return torch.cat([self.model(b, use_cache=False).logits[:, :-1].log_softmax(-1) for b in windows.split(8)])

    def perplexity(self, windows: Tensor) -> float:
        """Of windows [B, W]."""
        found = self.log_probabilities(windows).gather(-1, windows[:, 1:, None])
        return math.exp(-float(found.double().mean()))


NAMES = ("gate_up_proj", "down_proj")
MEASURED = ("squares", "uses", "own", "hessian", "outputs", "residual", "fisher")
CRITERIA = (*MEASURED, "relative", "alike")
"""relative: outputs beside the sum of the squares of the layer's own; alike: beside the layer's error at 2 bits."""


def restored(weight: Tensor, scheme: Scheme, quantizer: Quantizer | None = None) -> Tensor:
    """A matrix [N, K] quantized (by the scheme's own quantizer, if by no other), packed and read back."""
    matrix = packed_matrix("m", *weight.shape, scheme, "float32")
    blob = torch.zeros(matrix.segments[-1].offset + matrix.segments[-1].nbytes, dtype=torch.uint8)
    encode(matrix, [weight], quantizer or quantizer_for(scheme), blob)
    return dequantize(matrix, parts_of(matrix, blob), torch.float32)


def under(plain: Weights, scheme: Scheme, quantizer: Quantizer | None = None) -> Weights:
    """All experts under one scheme."""
    gate_up, down = (
        torch.stack([restored(m, scheme, quantizer) for m in own.flatten(0, 1)]).view_as(own) for own in plain
    )
    return gate_up, down


def inner(x: Tensor, gate_up: Tensor) -> Tensor:
    """What an expert's down matrix is given for x [t, H]: [t, I]."""
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return functional.silu(gate) * up


def criteria(subject: Subject, schemes: list[Weights]) -> dict[str, Floats]:
    """Name -> errors [L, E, S]."""
    layers, experts = subject.plain[0].shape[:2]
    found = {name: np.zeros((layers, experts, len(schemes))) for name in MEASURED}
    energy = np.zeros((layers, 1, 1))
    for layer in range(layers):
        hidden, ids, shares = subject.inputs[layer]
        for expert in range(experts):
            tokens, places = (ids == expert).nonzero(as_tuple=True)
            x, share = hidden[tokens], shares[tokens, places, None]
            plain = [own[layer, expert] for own in subject.plain]
            act = inner(x, plain[0])
            energy[layer] += float((act @ plain[1].T * share).square().sum())
            moments = [(x * share).square().sum(0), (act * share).square().sum(0)]
            for number, weights in enumerate(schemes):
                other = [own[layer, expert] for own in weights]
                squares = [(a - b).square() for a, b in zip(plain, other, strict=True)]
                change = share * (inner(x, other[0]) @ other[1].T - act @ plain[1].T)  # [t, H]
                values = {
                    "squares": sum(float(s.sum()) for s in squares),
                    "uses": len(tokens) * sum(float(s.sum()) for s in squares),
                    "own": sum(float(s.sum()) for s in squares) / sum(float(p.square().sum()) for p in plain),
                    "hessian": sum(float((s @ m).sum()) for s, m in zip(squares, moments, strict=True)),
                    "outputs": float(change.square().sum()),
                    "residual": float((change.square().sum(-1) / subject.residuals[layer][tokens]).sum()),
                    "fisher": float((change * subject.gradients[layer][tokens]).sum(-1).square().sum()),
                }
                for name, value in values.items():
                    found[name][layer, expert, number] = value
    worst = found["outputs"].sum(1, keepdims=True).max(-1, keepdims=True)  # [L, 1, 1]
    return found | {"relative": found["outputs"] / energy, "alike": found["outputs"] / worst}


def divergences(subject: Subject, schemes: list[Weights], tokens: int) -> Floats:
    """[L, E, S]: KL of the whole model when one expert is quantized, on the calibration's first windows."""
    windows = subject.calibration[: max(1, tokens // WINDOW)]
    base = subject.log_probabilities(windows)
    layers, experts = subject.plain[0].shape[:2]
    found = np.zeros((layers, experts, len(schemes)))
    for layer, expert, number in np.ndindex(*found.shape):
        for name, own in zip(NAMES, schemes[number], strict=True):
            place = getattr(subject.experts[layer], name).data[expert]
            place.copy_(own[layer, expert])
        now = subject.log_probabilities(windows)
        found[layer, expert, number] = max(0.0, float((base.exp() * (base - now)).sum(-1).mean()))
        for name, plain in zip(NAMES, subject.plain, strict=True):
            getattr(subject.experts[layer], name).data[expert].copy_(plain[layer, expert])
    return found


def layer_divergences(subject: Subject, scheme: Scheme) -> None:
    """Print KL of the whole model when all experts of one layer are quantized, on half of the calibration."""
    windows = subject.calibration[: max(1, len(subject.calibration) // 2)]
    base, weights = subject.log_probabilities(windows), under(subject.plain, scheme)
    for layer, experts in enumerate(subject.experts):
        for name, own in zip(NAMES, weights, strict=True):
            getattr(experts, name).data.copy_(own[layer])
        now = subject.log_probabilities(windows)
        print(f"layer {layer} {scheme.label}: KL {float((base.exp() * (base - now)).sum(-1).mean()):.4f}", flush=True)
        for name, own in zip(NAMES, subject.plain, strict=True):
            getattr(experts, name).data.copy_(own[layer])


def compare(
    subject: Subject, windows: Tensor, blobs: Blobs, shares: list[float], kl_tokens: int, names: list[str]
) -> None:
    """Print perplexities by criterion and budget."""
    schemes = [under(subject.plain, scheme) for scheme in blobs.schemes]
    errors = {name: own for name, own in criteria(subject, schemes).items() if name in names}
    if kl_tokens:
        errors["kl"] = divergences(subject, schemes, kl_tokens)
    for number, (scheme, weights) in enumerate(zip(blobs.schemes, schemes, strict=True)):
        subject.put(weights)
        bits = blobs.bits(blobs.experts * int(blobs.sizes[:, number].sum()))
        print(f"all {scheme.label}, {bits:.3f} bits: {subject.perplexity(windows):.2f}", flush=True)
    layers, experts = subject.plain[0].shape[:2]
    for share in shares:
        room = int(share * experts * blobs.sizes[:, 0].sum())
        for (name, own), by_layer in ((item, by) for item in errors.items() for by in (False, True)):
            per = experts if by_layer else 1
            grouped = own.reshape(-1, per, len(schemes)).sum(1)
            sizes = np.repeat(per * blobs.sizes, experts // per, axis=0)
            chosen = allocate(grouped, np.ones(len(grouped)), sizes, room)
            numbers = np.repeat(chosen.choices, per).reshape(layers, experts)
            subject.put(_mixed(schemes, numbers))
            bits = blobs.bits(chosen.nbytes)
            unit = "layers" if by_layer else "experts"
            print(f"{name:9} {unit:8} {bits:.3f} bits: {subject.perplexity(windows):.2f}", flush=True)


def _mixed(schemes: list[Weights], numbers: npt.NDArray[np.int64]) -> Weights:
    """Each expert under the scheme that `numbers` [L, E] names."""
    chosen = torch.from_numpy(numbers)[:, :, None, None]
    gate_up, down = (torch.stack(own) for own in zip(*schemes, strict=True))  # [S, L, E, N, K]
    return (gate_up.take_along_dim(chosen[None], 0)[0], down.take_along_dim(chosen[None], 0)[0])


def at_random(subject: Subject, windows: Tensor, draws: int) -> None:
    """Print perplexities of as many 3-bit experts as 10% more than 2 bits pay for, drawn by lot."""
    schemes = [under(subject.plain, scheme) for scheme in WIDTHS]
    layers, experts = subject.plain[0].shape[:2]
    random = np.random.default_rng(0)
    for _ in range(draws):
        numbers = np.zeros(layers * experts, np.int64)
        numbers[random.choice(len(numbers), 3 * len(numbers) // 10, replace=False)] = 1
        subject.put(_mixed(schemes, numbers.reshape(layers, experts)))
        print(f"by lot: {subject.perplexity(windows):.2f}", flush=True)


def scaling(subject: Subject, windows: Tensor) -> None:
    """Print perplexities with activation-aware scales and with outliers in 16 bits."""
    for scheme in WIDTHS[:2]:
        for name, change in (("plain", _plain), ("scaled", _scaled), ("0.5% in 16 bits", _outliers)):
            subject.put(_changed(subject, scheme, change))
            print(f"{scheme.label} {name}: {subject.perplexity(windows):.2f}", flush=True)


def _changed(subject: Subject, scheme: Scheme, change: Callable[[Tensor, Tensor, Scheme], Tensor]) -> Weights:
    """Every matrix changed by what it is given; gate and up of a layer's experts together, whose input they share."""
    gate_up, down = (torch.empty_like(own) for own in subject.plain)
    for layer in range(len(gate_up)):
        hidden, ids, shares = subject.inputs[layer]
        together = subject.plain[0][layer]
        gate_up[layer] = change(together.flatten(0, 1), hidden, scheme).view_as(together)
        for expert in range(len(together)):
            tokens, places = (ids == expert).nonzero(as_tuple=True)
            act = inner(hidden[tokens], together[expert]) * shares[tokens, places, None]
            down[layer, expert] = change(subject.plain[1][layer, expert], act, scheme)
    return gate_up, down


def _plain(weight: Tensor, _: Tensor, scheme: Scheme) -> Tensor:
    return restored(weight, scheme)


def _scaled(weight: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    """Columns times mean(|x|)^a, normalised, before quantizing, and divided by it afterwards; a of the least error."""
    mean, best = x.abs().mean(0).clamp(min=1e-4), (math.inf, weight)
    for power in (0.0, 0.25, 0.5, 0.75):
        scale = mean**power
        scale = scale / (scale.max() * scale.min()).sqrt()
        other = restored(weight * scale, scheme) / scale
        best = min(best, (float((x[:2048] @ (other - weight).T).square().sum()), other), key=lambda pair: pair[0])
    return best[1]


def _outliers(weight: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    """The 0.5% of the weights with the largest w^2 E[x^2] stay; the rest is quantized without them."""
    salience = weight.square() * x.square().mean(0)
    kept = salience >= salience.flatten().topk(weight.numel() // 200).values[-1]
    return torch.where(kept, weight, restored(weight.masked_fill(kept, 0.0), scheme))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="text whose first 4,096 tokens are used")
    parser.add_argument("--text", type=Path, required=True, help="text that is evaluated")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text's beginning")
    parser.add_argument("--model", default="demo", help="a checkpoint in transformers' layout")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["2", "3", "4"], help="to choose from")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.1], help="of the size of 2 bits for all")
    parser.add_argument("--kl-tokens", type=int, default=1024, help="for KL by expert, the slow one; 0: leave it out")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA), help="beside KL")
    parser.add_argument("--scaling", action="store_true", help="compare scales and outliers, and no criteria")
    parser.add_argument("--layers", action="store_true", help="KL of each layer alone at 2 bits, and no criteria")
    parser.add_argument("--lots", type=int, default=0, help="so many draws of experts by lot, and no criteria")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    directory = resolve_model(asked.model)
    codec = TextCodec(directory)

    def windows(path: Path, count: int) -> Tensor:
        ids = codec.encode(path.read_text())[:count]
        return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)

    subject = Subject(directory, windows(asked.calibration, 4096))
    held = windows(asked.text, asked.tokens)
    if asked.scaling:
        return scaling(subject, held)
    if asked.layers:
        return layer_divergences(subject, WIDTHS[0])
    if asked.lots:
        return at_random(subject, held, asked.lots)
    blobs = Blobs.of(Checkpoint.open(directory), [SCHEMES[name] for name in asked.schemes])
    return compare(subject, held, blobs, asked.shares, asked.kl_tokens, asked.criteria)


if __name__ == "__main__":
    main()
