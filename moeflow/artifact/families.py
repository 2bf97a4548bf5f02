"""What moeflow must be told about a model family: names on disk, and where its experts and its router are.

transformers writes the forward pass; a family only says which tensors of a checkpoint are which expert's, how
the others are called in transformers' model where that differs, and which modules hold experts and router. All
of it can be read off transformers' model and its conversion mapping, and `moeflow.artifact.discovery` does so for
a family that is not listed here. The listed ones are what it found, written down: sizes and plans then need
neither torch nor transformers. A test derives each again. It lies below the packer because packing needs it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from moeflow.schema import ResidentRole

__all__ = ["Family", "ExpertTensor", "FAMILIES", "ROLES", "ATTENTION", "SHARED_EXPERTS", "HEAD"]

ROLES = ("gate", "up", "gate_up", "down", "gate_up_bias", "down_bias")
# Projections of attention layers; a norm or a sink of the same module has no `proj` in its name.
ATTENTION = r"\.(self_attn|attention|attn)\.\w*proj\w*\.weight$"
# Matrices of the experts that every token uses; their gate in Qwen2-MoE, one row, is a module of another name.
SHARED_EXPERTS = r"\.(shared_experts?|shared_mlp)\.\w+\.weight$"
HEAD = r"^lm_head\.weight$"
# Tables that old checkpoints hold and transformers computes.
COMPUTED = r"rotary_emb\.inv_freq$"


@dataclass(frozen=True)
class ExpertTensor:
    """One of an expert's arrays, or the same one of all experts of a layer."""

    layer: int
    expert: int | None
    """None where the tensor holds all experts of the layer, stacked along its first dimension."""
    role: str
    """One of `ROLES`."""


@dataclass(frozen=True)
class Family:
    """A model family. Names are whole, with `{layer}` and `{expert}` where numbers stand."""

    model_type: str
    experts: Mapping[str, str]
    """Role -> tensor on disk; without `{expert}` where one tensor holds all experts of a layer."""
    module: str = "model.layers.{layer}.mlp.experts"
    """The experts module in transformers' model."""
    router: str = "model.layers.{layer}.mlp.gate"
    """The router module in transformers' model; empty if there is none that could be asked for guesses."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Tensor on disk -> parameter in transformers' model, where they differ."""
    transposed: bool = False
    """Whether matrices of fused tensors map inputs (rows) to outputs (columns), as gpt-oss has them."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that transformers' model does not use."""
    attention: str = ATTENTION
    """Regular expression of the parameters that the attention scheme applies to."""
    shared_experts: str = SHARED_EXPERTS
    """The same for shared experts' scheme."""
    head: str = HEAD
    """The same for the output head's."""

    @property
    def biased(self) -> bool:
        """Whether experts have biases."""
        return "down_bias" in self.experts

    @cached_property
    def _expert_names(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(template), role) for role, template in self.experts.items()]

    @cached_property
    def _renamed(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(disk), name) for disk, name in self.renames.items()]

    @cached_property
    def _layer_prefix(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.module.partition("{layer}")[0]) + r"(\d+)\.")

    def expert_tensor(self, name: str) -> ExpertTensor | None:
        """Which array of which expert a tensor of the checkpoint is, or None."""
        for pattern, role in self._expert_names:
            if match := pattern.fullmatch(name):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                return ExpertTensor(numbers["layer"], numbers.get("expert"), role)
        return None

    def resident_name(self, name: str) -> str:
        """The parameter's name in transformers' model."""
        for pattern, target in self._renamed:
            if match := pattern.fullmatch(name):
                return target.format(**match.groupdict())
        return name

    def is_unused(self, name: str, layers: int) -> bool:
        """Whether transformers' model of `layers` layers has no place for the tensor.

        Checkpoints carry layers beyond the last for predicting several tokens at once (DeepSeek-V3, GLM-4.5).
        """
        beyond = self._layer_prefix.match(name)
        if beyond and int(beyond[1]) >= layers:
            return True
        return any(re.search(pattern, name) for pattern in (COMPUTED, *self.ignored))

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that a parameter is in."""
        found = self._layer_prefix.match(name)
        return int(found[1]) if found else None

    def resident_role(self, name: str) -> ResidentRole | None:
        """Whose scheme applies to this parameter; None: it always stays as it is."""
        roles: dict[ResidentRole, str] = {
            "attention": self.attention,
            "shared_experts": self.shared_experts,
            "head": self.head,
        }
        return next((role for role, pattern in roles.items() if re.search(pattern, name)), None)


def _pattern(template: str) -> re.Pattern[str]:
    """A name with numbers as a regular expression."""
    pattern = re.escape(template)
    for key in ("layer", "expert"):
        pattern = pattern.replace(rf"\{{{key}\}}", rf"(?P<{key}>\d+)")
    return re.compile(pattern)


def _each(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, str]:
    """A tensor for each expert and projection."""
    names = {"gate": gate, "up": up, "down": down}
    return {role: f"{prefix}.{{expert}}.{name}.weight" for role, name in names.items()}


_LAYER = "model.layers.{layer}"
_MIXTRAL = _each(f"{_LAYER}.block_sparse_moe.experts", "w1", "w3", "w2")
_QWEN = _each(f"{_LAYER}.mlp.experts")
_FEED_FORWARD = f"{_LAYER}.feed_forward.experts"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("deepseek_v2", _QWEN),
        Family("deepseek_v3", _QWEN),
        Family("dots1", _QWEN),
        Family(
            "ernie4_5_moe",
            _QWEN,
            renames={
                f"{_LAYER}.mlp.moe_statics.e_score_correction_bias": (
                    f"{_LAYER}.mlp.gate.moe_statics.e_score_correction_bias"
                )
            },
            ignored=("mtp",),
        ),
        Family("glm4_moe", _QWEN),
        Family(
            "gpt_oss",
            {
                "gate_up": f"{_LAYER}.mlp.experts.gate_up_proj",
                "down": f"{_LAYER}.mlp.experts.down_proj",
                "gate_up_bias": f"{_LAYER}.mlp.experts.gate_up_proj_bias",
                "down_bias": f"{_LAYER}.mlp.experts.down_proj_bias",
            },
            router=f"{_LAYER}.mlp.router",
            transposed=True,
        ),
        Family(
            "granitemoe",
            {
                "gate_up": f"{_LAYER}.block_sparse_moe.input_linear.weight",
                "down": f"{_LAYER}.block_sparse_moe.output_linear.weight",
            },
            module=f"{_LAYER}.block_sparse_moe.experts",
            router=f"{_LAYER}.block_sparse_moe.router",
            renames={
                f"{_LAYER}.block_sparse_moe.router.layer.weight": f"{_LAYER}.block_sparse_moe.router.weight",
            },
        ),
        Family("hunyuan_v1_moe", _QWEN),
        Family("jamba", _each(_FEED_FORWARD), module=_FEED_FORWARD, router=f"{_LAYER}.feed_forward.router"),
        Family(
            "lfm2_moe",
            _each(_FEED_FORWARD, "w1", "w3", "w2"),
            module=_FEED_FORWARD,
            router=f"{_LAYER}.feed_forward.gate",
        ),
        Family(
            "mixtral",
            _MIXTRAL,
            renames={f"{_LAYER}.block_sparse_moe.gate.weight": f"{_LAYER}.mlp.gate.weight"},
        ),
        Family("olmoe", _QWEN),
        Family(
            "phimoe",
            _MIXTRAL,
            router=f"{_LAYER}.mlp.router",
            renames={f"{_LAYER}.block_sparse_moe.gate.weight": f"{_LAYER}.mlp.router.weight"},
        ),
        Family("qwen2_moe", _QWEN),
        Family("qwen3_moe", _QWEN),
    )
}
