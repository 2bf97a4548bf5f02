"""Names and shapes of a model's tensors on disk from its config, by the tables of the listed families.

What `moeflow.artifact.synthetic` learns from transformers' model, without torch and transformers: a plan for a model of
which only the config is here takes less time than importing them. Families without a table go through transformers.
What the config does not say is refused by file and key, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.facts import EXPERTS, ModelConfig
from moeflow.artifact.families import FAMILIES, Family
from moeflow.artifact.layers import role_shapes
from moeflow.artifact.parts import Part
from moeflow.artifact.structures import STRUCTURES, Structure
from moeflow.artifact.synthetic import (
    STORED,
    Shape,
    bare_checkpoint,
    config_dtype,
    plain_config,
    synthetic_checkpoint,
)
from moeflow.errors import CheckpointError

__all__ = ["config_checkpoint"]

LAYER = "model.layers.{layer}."
"""Before the names of a layer's tensors, in every family here."""


def config_checkpoint(config: Mapping[str, Any], source: str) -> Checkpoint:
    """The checkpoint of a config, headers only: what `synthetic_checkpoint` gives, at once where there is a table.

    Args:
        config: as in a config.json. Its `quantization_config` is left out: shapes are those of plain weights.
        source: what errors call the model: a directory, a config's file, or a name.

    Raises:
        CheckpointError: the config lacks a number that shapes depend on, or moeflow does not know the family.
    """
    model_type = str(config.get("model_type", ""))
    if model_type not in STRUCTURES:
        return synthetic_checkpoint(config, source)
    plain = plain_config(config)
    dtype = STORED[config_dtype(plain, source)]
    numbers = ModelConfig.of(plain, Path(source))
    described = _Description(numbers, STRUCTURES[model_type], FAMILIES[model_type], dtype)
    return bare_checkpoint(plain, source, described.shapes())


class _Description:
    """Puts a config's numbers into a structure."""

    def __init__(self, config: ModelConfig, structure: Structure, family: Family, dtype: str):
        self.config = config
        self.structure = structure
        self.family = family
        self.dtype = dtype
        self._numbers: dict[str, int] = {}

    def shapes(self) -> dict[str, Shape]:
        """Name on disk -> dtype and shape, of every tensor."""
        found = dict(self._tensors(self.structure.around))
        for layer in range(self.config.layers):
            is_moe = self.structure.is_moe(self.config, layer)
            attends = self.structure.attends(self.config, layer)
            mixer = self.structure.attention if attends else self.structure.recurrent
            parts = (*self.structure.norms, *mixer, *(self.structure.moe if is_moe else self.structure.dense))
            found.update(self._tensors(parts, LAYER.format(layer=layer)))
            if is_moe:
                found.update(self._experts(layer))
        return found

    def _tensors(self, parts: tuple[Part, ...], prefix: str = "") -> Iterator[tuple[str, Shape]]:
        for part in parts:
            if all(self._is_on(switch) for switch in part.when):
                yield prefix + part.name, (part.dtype or self.dtype, tuple(self._sum(size) for size in part.shape))

    def _experts(self, layer: int) -> Iterator[tuple[str, Shape]]:
        count = self._number("experts")
        hidden, inner = self._number("hidden_size"), self._number(self.structure.inner)
        shapes = role_shapes(hidden, inner)
        for role, template in self.family.experts.items():
            shape = shapes[role]
            if self.family.transposed:
                shape = shape[::-1]
            if "{expert}" in template:
                for expert in range(count):
                    yield template.format(layer=layer, expert=expert), (self.dtype, shape)
            else:
                yield template.format(layer=layer), (self.dtype, (count, *shape))

    def _is_on(self, switch: str) -> bool:
        key = switch.removeprefix("!")
        own = self.structure.renamed.get(key, key)
        key = own if own in self.config.values else key
        if key not in self.config.values and key in self.structure.states:
            raise CheckpointError(f"{self.config.file}: has no {key}; shapes depend on it")
        value = self.config.values.get(key, key in self.structure.on)
        if not isinstance(value, bool | int | None):
            raise CheckpointError(f"{self.config.file}: {key} is {value!r}, true or false is needed")
        return bool(value) != switch.startswith("!")

    def _sum(self, size: str) -> int:
        """A dimension as `Part.shape` has it."""
        return sum(prod(map(self._number, term.split("*"))) for term in size.split("+"))

    def _number(self, key: str) -> int:
        if key not in self._numbers:
            derived = _DERIVED.get(key)
            self._numbers[key] = int(key) if key.isdigit() else derived(self) if derived else self.config.positive(key)
        return self._numbers[key]

    def _experts_per_layer(self) -> int:
        named = next((name for name in EXPERTS if name in self.config.values), None)
        if named is None:
            raise CheckpointError(f"{self.config.file}: has no number of experts under {', '.join(EXPERTS)}")
        return self.config.positive(named)

    def _head_dim(self) -> int:
        if self.config.values.get("head_dim") is not None or "head_dim" in self.structure.states:
            return self.config.positive("head_dim")
        return self._number("hidden_size") // self._number("num_attention_heads")

    def _key_value_heads(self) -> int:
        key = "num_key_value_heads"
        same = key in self.config.values and self.config.values[key] is None  # as many as of queries, by convention
        return self._number("num_attention_heads") if same else self.config.positive(key)

    def _step_rank(self) -> int:
        """Of Mamba's time steps."""
        automatic = self.config.values.get("mamba_dt_rank") == "auto"
        return -(-self._number("hidden_size") // 16) if automatic else self.config.positive("mamba_dt_rank")


# What is not in a config under this name as a plain number.
_DERIVED: Mapping[str, Callable[[_Description], int]] = {
    "experts": _Description._experts_per_layer,
    "head_dim": _Description._head_dim,
    "num_key_value_heads": _Description._key_value_heads,
    "mamba_dt_rank": _Description._step_rank,
}
