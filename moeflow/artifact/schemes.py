"""Which scheme each matrix of one checkpoint is stored under: a quantization, applied to a model.

A scheme that would change nothing, because the model has no such matrices or layers or ties them to others, is refused
here, before work begins. Knows names and layer numbers, not shapes: whether a group fits is `artifact.layout`'s to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeflow.errors import DocumentError
from moeflow.schema import DenseScheme, Override, Quantization, ResidentRole, Scheme
from moeflow.schema.layers import spans, written
from moeflow.schema.quantization import LayerRole

if TYPE_CHECKING:
    from moeflow.artifact.checkpoint import Checkpoint

__all__ = ["Schemes"]


class Schemes:
    """The schemes of one checkpoint under one quantization.

    Raises:
        DocumentError: a scheme has nothing to apply to.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: Quantization):
        self._quantization = quantization
        self._checkpoint = checkpoint
        self._type = checkpoint.family.model_type
        self._roles: dict[str, ResidentRole] = {}
        for name in checkpoint.resident:
            if role := checkpoint.family.resident_role(name):
                self._roles[name] = role
        self._check_shared_experts()
        self._check_head()
        self._check_overrides()

    def experts(self, position: int) -> tuple[Scheme, ...]:
        """Of each expert of the MoE layer at `position`."""
        layer = self._checkpoint.layers[position]
        return tuple(self._quantization.scheme("experts", layer.index, e) for e in range(len(layer.experts)))

    @property
    def resident(self) -> dict[str, tuple[ResidentRole, Scheme]]:
        """Parameters outside the experts that are quantized: what they are, and how."""
        found: dict[str, tuple[ResidentRole, Scheme]] = {}
        for name, role in self._roles.items():
            scheme = self._quantization.scheme(role, self._checkpoint.family.layer_of(name))
            if not isinstance(scheme, DenseScheme):
                found[name] = role, scheme
        return found

    def _check_shared_experts(self) -> None:
        scheme = self._quantization.shared_experts
        if not isinstance(scheme, DenseScheme) and "shared_experts" not in self._roles.values():
            raise DocumentError(
                f"quantization.shared_experts is {scheme.label}; this {self._type} has no shared experts: leave it out"
            )

    def _check_head(self) -> None:
        scheme = self._quantization.head
        if isinstance(scheme, DenseScheme):
            return
        # Where both are one tensor, checkpoints hold it once, under the embedding's name; some hold a copy.
        if self._checkpoint.config.get("tie_word_embeddings") is True or "head" not in self._roles.values():
            raise DocumentError(
                f"quantization.head is {scheme.label}; this {self._type} ties its output head to the embedding, whose "
                "rows are looked up as plain numbers, so that packing would add a copy and save nothing: leave it out"
            )

    def _check_overrides(self) -> None:
        """Every layer and expert that an override names is there, and each of its schemes finds something in one."""
        layers = self._checkpoint.facts.layers
        having = self._layers_by_role()
        for number, override in enumerate(self._quantization.overrides):
            place = f"quantization.overrides.{number}"
            if max(span.stop for span in spans(override.layers)) > layers:
                raise DocumentError(
                    f"{place}.layers is {override.layers}; this {self._type} has layers 0 to {layers - 1}: "
                    "name some of these"
                )
            for role, scheme in override.schemes.items():
                if not any(override.covers(layer) for layer in having[role]):
                    there = f"layers {written(having[role])} have" if having[role] else "no layer of this model has"
                    raise DocumentError(
                        f"{place}.{role} is {scheme.label}; {override.layers} matches nothing: "
                        f"{there} {role.replace('_', ' ')}"
                    )
            if override.only_experts is not None:
                self._check_experts(place, override, override.only_experts)

    def _check_experts(self, place: str, override: Override, pattern: str) -> None:
        """Every expert of the pattern is in every layer that has experts and that the override names."""
        stop = max(span.stop for span in spans(pattern))
        for layer in self._checkpoint.layers:
            if override.covers(layer.index) and stop > len(layer.experts):
                raise DocumentError(
                    f"{place}.only_experts is {pattern}; layer {layer.index} of this {self._type} has experts 0 to "
                    f"{len(layer.experts) - 1}: name some of these"
                )

    def _layers_by_role(self) -> dict[LayerRole, list[int]]:
        """The decoder layers that have matrices of a role."""
        found: dict[LayerRole, list[int]] = {
            "experts": [layer.index for layer in self._checkpoint.layers],
            "attention": [],
            "shared_experts": [],
        }
        for name, role in self._roles.items():
            layer = self._checkpoint.family.layer_of(name)
            if role != "head" and layer is not None:
                found[role].append(layer)
        return found
