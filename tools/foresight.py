"""Policies and predictors at the sizes of large experts: what a trained model's routers did, replayed in real copies.

    python tools/foresight.py record artifacts/mid-8x2 --text heldout.txt -n 1200 -o mid-8x2.npz
    python tools/foresight.py bench mid-8x2.npz --model mixtral-8x7b --bits 2 -k 4 -o found.json   # on a CUDA device

What: `record` reads a text through a model that has a predictor and keeps, for every token and layer, the experts used,
what the next layer's gate and the learned predictor guessed of them, and the learned scores of reuse. `bench` forces
all this upon a model in random weights with experts of a published size and as many layers as were recorded.
Why so: models that are small enough to be trained in minutes have experts so small that no copy takes as long as the
layer around it; models whose copies matter cannot be trained here. Decisions are a real model's, bytes and times are
those of large experts.
What it does not do: predictors' own products are not in the time, since the table stands for them.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moeflow
from moeflow import pipeline
from moeflow.artifact.architectures import architecture
from moeflow.artifact.predictors import load_predictor
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.bench import Settings, measure_limits, run_rows
from moeflow.files import read_text
from moeflow.learning.judgement import scores_of
from moeflow.model.routers import find_routers
from moeflow.model.routes import ForcedRoutes
from moeflow.probe.environment import environment
from moeflow.recording import read_through, text_ids
from moeflow.schema import Benchmark, Profile

WARM = 64  # tokens before those that are timed
WAYS = (
    ("lru", "none"),
    ("lru", "next-gate"),
    ("lru", "learned"),
    ("lfu", "next-gate"),
    ("mix", "next-gate"),
    ("learned", "none"),
    ("learned", "next-gate"),
    ("learned", "learned"),
)
SHAPES: dict[str, tuple[str, str]] = {
    "mixtral-8x7b": ("num_local_experts", "num_experts_per_tok"),
    "qwen3-30b-a3b": ("num_experts", "num_experts_per_tok"),
}


class Notes:
    """A recorder of passes."""

    def __init__(self, engine: Any):
        artifact = engine.artifact
        self._top_k, layers = artifact.manifest.model.top_k, artifact.manifest.layers
        _, self._matrices = load_predictor(artifact)
        self._gates = find_routers(engine.model, layers, self._top_k, getattr(torch, engine.plan.dtype))
        self.found: dict[str, list[list[np.ndarray[Any, Any]]]] = {
            n: [] for n in ("routes", "gate", "learned", "scores")
        }

    def note(self, layer: int, hidden_states: Tensor, index: Tensor, _weights: Tensor) -> None:
        if layer == 0:
            silent = np.zeros(tuple(index.shape), np.int16)  # nothing guesses the first layer
            for name, rows in self.found.items():
                rows.append([silent] if name in ("gate", "learned") else [])
        row = {name: rows[-1] for name, rows in self.found.items()}
        row["routes"].append(index.numpy().astype(np.int16))
        row["scores"].append(scores_of(self._matrices.keep[layer], hidden_states).numpy().astype(np.float16))
        if layer + 1 < len(self._matrices.keep):
            matrix = self._matrices.guess[0][layer + 1]
            assert matrix is not None and self._gates is not None
            said = scores_of(matrix, hidden_states).topk(self._top_k, dim=1).indices
            row["learned"].append(said.numpy().astype(np.int16))
            row["gate"].append(self._gates[layer + 1](hidden_states).numpy().astype(np.int16))

    def end(self, _tokens: int) -> None:
        """All is kept as it is noted."""


def record(artifact: Path, text: Path, tokens: int, output: Path) -> None:
    with moeflow.load(artifact, record_routes=True, execution="host", policy="lru", predictor="none") as engine:
        assert engine.recorder is not None
        notes = engine.recorder.listener = Notes(engine)
        for _ in read_through(engine, text_ids(engine, read_text(text), tokens)):
            pass
    passes = {name: [np.stack(layers, axis=1) for layers in rows] for name, rows in notes.found.items()}
    np.savez_compressed(output, **{name: np.concatenate(rows) for name, rows in passes.items()})


def forced(noted: dict[str, np.ndarray[Any, Any]], policy: str, predictor: str, device: torch.device) -> ForcedRoutes:
    def table(name: str, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(noted[name]).to(device, dtype)

    guesses = {"none": None, "next-gate": "gate", "learned": "learned"}[predictor]
    return ForcedRoutes(
        table("routes", torch.int64),
        table(guesses, torch.int64) if guesses else None,
        scores=table("scores", torch.float32) if policy == "learned" else None,
    )


def bench(path: Path, model: str, bits: int, k: int, output: Path) -> None:
    noted = dict(np.load(path))
    tokens, layers, top_k = noted["routes"].shape
    experts = noted["scores"].shape[2]
    names = SHAPES[model]
    config = {**architecture(model), names[0]: experts, names[1]: top_k, "num_hidden_layers": layers}
    scheme = {"backend": "hqq", "bits": bits, "group_size": 64}
    quantization = {"experts": scheme, "attention": {"backend": "hqq", "bits": 4, "group_size": 64}}
    settings = []
    for policy, predictor in WAYS:
        prefetch = {"predictor": predictor, **({"depth": 0} if predictor == "none" else {})}
        profile = Profile.parse(
            {"model": model, "quantization": quantization, "context_length": 2048, "cache": {"policy": policy},
             "prefetch": prefetch, "cpu": {"experts": "off"}},
            "foresight",
        )  # fmt: skip
        made = partial(forced, noted, policy, predictor)
        settings.append(Settings(profile, k, "recorded", tokens=tokens - WARM, warm_up=WARM, prompt=64, forced=made))
    artifact = RandomArtifact(config, settings[0].profile.quantization, model)
    hardware, limits = pipeline.resolve_hardware("auto"), measure_limits()
    rows = []
    for (policy, predictor), row in zip(WAYS, run_rows(artifact, hardware, *settings), strict=True):
        foreseen = (row.guesses_used or 0) / ((tokens - WARM) * layers * top_k)
        said = f"{policy}, {predictor}: {row.tokens_per_second:.1f} tokens/s, hits {row.hit_rate:.1%}"
        print(f"{said}, foreseen {foreseen:.1%}, link {row.moved_bytes / 1e6:.1f} MB a token", flush=True)
        rows.append(row.model_copy(update={"note": f"{policy}, {predictor}" + (f"; {row.note}" if row.note else "")}))
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    command = " ".join(["python", *sys.argv])
    Benchmark(command=command, date=date, environment=environment(), limits=limits, rows=tuple(rows)).save(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record")
    recording.add_argument("artifact", type=Path)
    recording.add_argument("--text", type=Path, required=True)
    recording.add_argument("-n", "--tokens", type=int, required=True)
    recording.add_argument("-o", "--output", type=Path, required=True)
    benching = actions.add_parser("bench")
    benching.add_argument("path", type=Path)
    benching.add_argument("--model", choices=[*SHAPES], required=True)
    benching.add_argument("--bits", type=int, default=2)
    benching.add_argument("-k", type=int, required=True)
    benching.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    if given.action == "record":
        record(given.artifact, given.text, given.tokens, given.output)
    else:
        bench(given.path, given.model, given.bits, given.k, given.output)


if __name__ == "__main__":
    main()
