"""What moeflow must be told about a model family: names on disk, and where its router is.

transformers writes the forward pass; a family only says which tensors of a checkpoint are which expert's, how
the others are called in transformers' model, and where the router of a layer lives. It lies below the packer
because packing needs it too. A new family of the same structure is one entry here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeflow.errors import CheckpointError, unknown

__all__ = ["Family", "ExpertTensor", "family_of", "FAMILIES"]


@dataclass(frozen=True)
class ExpertTensor:
    """One of an expert's three matrices."""

    layer: int
    expert: int
    role: str
    """gate, up or down."""


@dataclass(frozen=True)
class Family:
    """A model family whose checkpoints hold one tensor per expert and projection."""

    model_type: str
    experts: str
    """Regular expression of an expert's tensor on disk, with groups layer, expert, projection."""
    roles: Mapping[str, str]
    """Projection name on disk -> gate, up, down."""
    renames: tuple[tuple[str, str], ...] = ()
    """Substring replacements from names on disk to names in transformers' model."""
    module: str = "model.layers.{layer}.mlp.experts"
    router: str = "model.layers.{layer}.mlp.gate"
    router_scores: int = 0
    """Which of the router's results holds the scores [T, E]."""
    attention: str = r"\.self_attn\.(q|k|v|o)_proj\.weight$"
    """Regular expression of the parameters that the attention scheme applies to."""

    def expert_tensor(self, name: str) -> ExpertTensor | None:
        """Which expert's which matrix a tensor of the checkpoint is, or None."""
        match = re.fullmatch(self.experts, name)
        if not match:
            return None
        return ExpertTensor(int(match["layer"]), int(match["expert"]), self.roles[match["projection"]])

    def resident_name(self, name: str) -> str:
        """The parameter's name in transformers' model."""
        for old, new in self.renames:
            name = name.replace(old, new)
        return name

    def is_attention(self, name: str) -> bool:
        """Whether the attention scheme applies to this parameter."""
        return re.search(self.attention, name) is not None


def _qwen_like(model_type: str) -> Family:
    """Families that name an expert's matrices gate_proj, up_proj and down_proj under `mlp.experts`."""
    return Family(
        model_type=model_type,
        experts=r"model\.layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight",
        roles={"gate": "gate", "up": "up", "down": "down"},
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="mixtral",
            experts=r"model\.layers\.(?P<layer>\d+)\.block_sparse_moe\.experts\.(?P<expert>\d+)"
            r"\.(?P<projection>w[123])\.weight",
            roles={"w1": "gate", "w3": "up", "w2": "down"},
            renames=((".block_sparse_moe.", ".mlp."),),
        ),
        _qwen_like("olmoe"),
        _qwen_like("qwen2_moe"),
        _qwen_like("qwen3_moe"),
    )
}


def family_of(config: Mapping[str, Any], place: str) -> Family:
    """The family of a checkpoint's config.

    Raises:
        CheckpointError: the model type is unknown; the message lists those that are known.
    """
    model_type = str(config.get("model_type", ""))
    if model_type not in FAMILIES:
        raise CheckpointError(f"{place}: {unknown('model type', model_type, FAMILIES)}")
    return FAMILIES[model_type]
