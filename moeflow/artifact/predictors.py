"""A learned predictor beside its artifact: one safetensors file of matrices, its card in the header's metadata.

A matrix [E, H + 1] turns a token's hidden states before a router, and a one, into a score for each expert:
`guess.D.L` says which experts MoE layer L will use, from the hidden states D layers before; `keep.L` how soon each
expert of layer L will be used again, in the unit of `PredictorCard.reuse`. They are kept as bfloat16, whose range no
model's weights leave. It computes nothing and chooses nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeflow.artifact.reader import Artifact
from moeflow.errors import ArtifactError
from moeflow.files import atomic_writer, storage_errors
from moeflow.schema import PredictorCard

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PREDICTOR", "Matrices", "load_predictor", "router_digest", "save_predictor"]

PREDICTOR = "predictor.safetensors"
CARD = "moeflow"
REMEDY = "make one by `moeflow train-predictor`"


@dataclass(frozen=True)
class Matrices:
    """Of all MoE layers."""

    guess: Sequence[Sequence[Tensor | None]]
    """[depth - 1][layer]: [E, H + 1]; None for layers that nothing so many layers before can guess."""
    keep: Sequence[Tensor]
    """[layer]: [E, H + 1]."""


def router_digest(artifact: Artifact) -> str:
    """SHA-256 over the routers' tensors as they are stored, in the order of layers."""
    tensors = artifact.resident_header().tensors
    path = artifact.directory / artifact.manifest.resident_shard
    digest = hashlib.sha256()
    with storage_errors(path, "read"), path.open("rb") as stream:
        for layer in artifact.manifest.layers:
            for name in sorted(name for name in tensors if name.startswith(f"{layer.router}.")):
                stream.seek(tensors[name].offset)
                digest.update(stream.read(tensors[name].nbytes))
    return digest.hexdigest()


def save_predictor(path: Path, card: PredictorCard, matrices: Matrices) -> None:
    """Write card and matrices, whole or not at all."""
    import torch
    from safetensors.torch import save

    named = {f"keep.{layer}": matrix for layer, matrix in enumerate(matrices.keep)}
    for ahead, row in enumerate(matrices.guess, start=1):
        named |= {f"guess.{ahead}.{layer}": matrix for layer, matrix in enumerate(row) if matrix is not None}
    half = {name: matrix.to("cpu", torch.bfloat16) for name, matrix in named.items()}
    with atomic_writer(path) as stream:
        stream.write(save(half, {CARD: card.to_json()}))


def load_predictor(artifact: Artifact, path: Path | None = None) -> tuple[PredictorCard, Matrices]:
    """The predictor of an artifact, float32 in host memory.

    Args:
        artifact: whose routers it must foresee.
        path: its file; by default the one in the artifact's directory.

    Raises:
        ArtifactError: there is none, it is damaged, or it belongs to another model.
    """
    from safetensors import SafetensorError, safe_open

    path = path or artifact.directory / PREDICTOR
    if not path.is_file():
        raise ArtifactError(f"{path}: missing; {REMEDY}")
    try:
        with storage_errors(path, "read"), safe_open(path, framework="pt") as reader:
            text = (reader.metadata() or {}).get(CARD)
            tensors = {name: reader.get_tensor(name).float() for name in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ArtifactError(f"{path}: not a predictor: {error}; {REMEDY}") from error
    if text is None:
        raise ArtifactError(f"{path}: not a predictor: it has no card; {REMEDY}")
    try:
        card = PredictorCard.parse(json.loads(text), str(path))
    except ValueError as error:  # of JSON
        raise ArtifactError(f"{path}: its card cannot be read: {error}; {REMEDY}") from error
    if card.routers != router_digest(artifact):
        raise ArtifactError(
            f"{path}: made for the routers of another model ({card.model}), not of "
            f"{artifact.manifest.model.source}; {REMEDY}"
        )
    try:
        return card, _matrices(card, tensors)
    except KeyError as error:
        raise ArtifactError(f"{path}: {error.args[0]}; {REMEDY}") from error


def _matrices(card: PredictorCard, tensors: dict[str, Tensor]) -> Matrices:
    """Raises KeyError with what is missing or of another shape."""

    def matrix(name: str, layer: int) -> Tensor:
        shape = (card.experts[layer], card.hidden + 1)
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise KeyError(f"{name} of shape {shape} is missing")
        return tensors[name]

    layers = range(len(card.experts))
    guess = [
        [matrix(f"guess.{ahead}.{layer}", layer) if layer >= ahead else None for layer in layers]
        for ahead in range(1, card.depth + 1)
    ]
    return Matrices(guess, [matrix(f"keep.{layer}", layer) for layer in layers])
