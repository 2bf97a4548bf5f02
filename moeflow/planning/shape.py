"""How many MoE layers a model has, of how many experts, of which a token uses how many: all that routes know of it.

Read off the config alone, without torch. Which layers are dense is said by keys of the families that have some; a
config that says it in a way of its own is counted as if all its layers had experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeflow.artifact.architectures import architecture
from moeflow.artifact.facts import ModelConfig
from moeflow.errors import CheckpointError

__all__ = ["Shape", "shape_of"]


@dataclass(frozen=True)
class Shape:
    """Of routes."""

    model: str
    layers: int
    """With experts."""
    experts: int
    """Per layer."""
    top_k: int


def shape_of(model: str) -> Shape:
    """The shape of a published model by name, or of a `config.json` by its path or its directory's.

    Raises:
        CheckpointError: the name is unknown, or the file is no config of a model with experts.
    """
    config = ModelConfig(architecture(model), Path(model))
    if not config.experts:
        raise CheckpointError(f"{model}: its config names no experts; only models that have some have routes")
    first = config.values.get("first_k_dense_replace") or 0
    dense = config.values.get("mlp_only_layers") or ()
    step = config.values.get("decoder_sparse_step") or 1
    layers = sum(i >= first and i not in dense and (i + 1) % step == 0 for i in range(config.layers))
    return Shape(model, layers, config.experts, config.top_k)
