"""Writes docs/models.md: the families that give transformers' own logits, each checked while the page is made.

`python tools/models_docs.py docs/models.md`. Packs and runs a tiny random checkpoint of every family, as
tests/families does, and leaves out what does not agree. Figures change with the random prompts; the test compares
everything else.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from oracle import checkpoint_model, dequantized_model, logits_of  # noqa: E402
from test_engine import CPU, NONE, TOLERANCE, hqq  # noqa: E402
from tiny import FAMILIES, tiny_checkpoint, tiny_unlisted  # noqa: E402
from tiny_families import UNLISTED  # noqa: E402

import moeflow  # noqa: E402
from moeflow.artifact.checkpoint import Checkpoint  # noqa: E402

HEAD = """# Models

Made by `python tools/models_docs.py docs/models.md`; a test checks that no family is missing. Listed is what was packed
and run, as a tiny random checkpoint that transformers saved, with the logits of transformers' own forward pass:
whole prompts, token by token and in pieces, with fewer cached experts than there are, guesses on and off, unquantized
and (against transformers on the dequantized weights) with hqq at 3 bits. Random weights include biases and routers'
correction biases. The error is the largest difference over the largest logit, in float32; the tests' bound is
{bound:.0e}. Sizes and speed of the real models follow from their shapes: `moeflow plan` says them.

| `model_type` | experts on disk | in the checkpoint that was run | error | quantized |
|---|---|---|---|---|
"""
GENERIC = """
## Other families

A `model_type` that is not listed is tried through the generic path: moeflow makes transformers' model without weights,
finds the experts that transformers dispatches, and takes the names on disk from transformers' conversion mapping. These
ran that way, with the same check, without a line of their own:

{names}

What does not fit is refused before anything is written, and the message says what was looked for and what was found.
Known not to fit: experts without a gate (Nemotron-H), experts that transformers does not dispatch through its
interface, models that are not causal language models. MiniMax-Text-01 packs and then fails at its first token, because
it wants a cache of its own (MiniMax-M2 runs).
[Adding a model](adding-a-model.md) takes a page.

## What differs between families

- **Guesses** apply the next layer's own router, with its groups and correction biases, to this layer's hidden states. A
  router that cannot be applied so ({without}) means no guesses; `moeflow generate` says so, and results are the same.
- **Mamba layers** (Jamba, Granite hybrid): transformers scans several tokens from an empty state only, so tokens after
  the first 512 of a prompt go one by one. A conversation whose past was edited is computed anew there, as it is with
  sliding windows that have moved on.
- **Memory for keys and values** is planned from the config: latent where the family keeps it latent (DeepSeek), as if
  windows never slid (gpt-oss, dots1), and with the states of Mamba and convolution layers added.
- **Layers for predicting several tokens** (DeepSeek-V3, GLM-4.5, ERNIE) are left out, as transformers does.
"""


def covers(checkpoint: Checkpoint) -> str:
    """What of the family's structure a checkpoint has."""
    config, names = checkpoint.config, [*checkpoint.resident]
    kinds = {str(kind) for kind in config.get("layer_types") or ()}
    found = {
        "dense layers": len(checkpoint.layers) < checkpoint.facts.layers,
        "shared experts": any(".shared_" in name for name in names),
        "expert biases": checkpoint.family.biased,
        "router correction bias": any(name.endswith(("correction_bias", "expert_bias")) for name in names),
        "router groups": (config.get("n_group") or 1) > 1,
        "router bias": any(name.endswith("router.bias") for name in names),
        "attention biases": any(name.endswith("q_proj.bias") for name in names),
        "latent attention": bool(config.get("kv_lora_rank")),
        "sliding window": "sliding_attention" in kinds,
        "convolutions": "conv" in kinds,
        "Mamba": any(".mamba." in name for name in names),
        "tied embeddings": bool(config.get("tie_word_embeddings")),
    }
    return ", ".join(name for name, present in found.items() if present) or "-"


def layout(checkpoint: Checkpoint) -> str:
    """How experts lie on disk."""
    family = checkpoint.family
    each = "{expert}" in family.experts["down"]
    return ("one by one" if each else "all of a layer") + (", transposed" if family.transposed else "")


def row(family: str, checkpoint: Checkpoint, errors: tuple[float, float]) -> str:
    cells = (f"`{family}`", layout(checkpoint), covers(checkpoint), *(f"{error:.0e}" for error in errors))
    return f"| {' | '.join(cells)} |"


class Runner:
    """Packs and compares in a directory of its own."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.hardware = directory / "cpu.yaml"
        moeflow.HardwareProfile.parse(CPU, "cpu").save(self.hardware)

    def error(self, checkpoint: Path, quantization: dict[str, object], oracle: Callable[[Path], object]) -> float:
        """The largest difference over the largest logit."""
        name = f"{checkpoint.name}-{'none' if quantization == NONE else 'hqq'}"
        profile = {"model": str(checkpoint), "quantization": quantization, "hardware": str(self.hardware)}
        artifact = moeflow.pack(profile, self.directory / name)
        ids = torch.randint(96, (40,), generator=torch.Generator().manual_seed(0)).tolist()
        expected = logits_of(oracle(checkpoint if quantization == NONE else artifact), ids)
        largest = 0.0
        for settings in ({"experts_per_layer": 3}, {"experts_per_layer": 3, "prefetch_depth": 0}):
            with moeflow.load(artifact, **settings) as engine:
                for chunk in (512, 1, 7):
                    difference = (engine.logits(ids, chunk=chunk) - expected).abs().max()
                    largest = max(largest, float(difference / expected.abs().max()))
        return largest

    def listed(self) -> str:
        rows = []
        for family in sorted(FAMILIES):
            checkpoint = tiny_checkpoint(self.directory / family, family, layers=3)
            errors = (self.error(checkpoint, NONE, checkpoint_model), self.error(checkpoint, hqq(3), dequantized_model))
            if max(errors) <= TOLERANCE:
                rows.append(row(family, Checkpoint.open(checkpoint), errors))
        return "\n".join(rows) + "\n"

    def generic(self) -> str:
        names, without = [], []
        for name in UNLISTED:
            checkpoint = tiny_unlisted(self.directory / name, name)
            if self.error(checkpoint, NONE, checkpoint_model) > TOLERANCE:
                continue
            names.append(f"`{name}`")
            with moeflow.load(self.directory / f"{name}-none") as engine:
                without += [] if engine.guessing else [f"`{name}`"]
        lines = textwrap.fill(", ".join(names) + ".", 120, break_on_hyphens=False)
        return GENERIC.format(names=lines, without=", ".join(without))


def page() -> str:
    with tempfile.TemporaryDirectory() as directory:
        runner = Runner(Path(directory))
        return HEAD.format(bound=TOLERANCE) + runner.listed() + runner.generic()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
