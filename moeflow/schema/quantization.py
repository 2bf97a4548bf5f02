"""How weights are stored: one model per backend, told apart by `backend`.

hqq: half-quadratic quantization, groups along the input dimension, a scale and zero per group
(https://mobiusml.github.io/hqq_blog). bitsandbytes: nf4 (QLoRA, https://arxiv.org/abs/2305.14314) and int8
(LLM.int8(), https://arxiv.org/abs/2208.07339). none: the checkpoint's own 16 bits. Which code does it is the
business of `moeflow.quantization`; what is stored, of `moeflow.artifact.layout`. `{bits: auto, budget: 2.75}` is no
scheme yet: packing measures, and puts schemes in its place (`moeflow.schema.auto`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from moeflow.schema.auto import AutoBits, auto_backend
from moeflow.schema.base import Part
from moeflow.schema.layers import ExpertPattern, LayerPattern, shared, spans

__all__ = [
    "HqqScheme",
    "BitsAndBytesScheme",
    "DenseScheme",
    "ExpertScheme",
    "Scheme",
    "Override",
    "Quantization",
    "LayerRole",
    "ResidentRole",
    "META_BLOCK",
    "scheme_settings",
]

LayerRole = Literal["experts", "attention", "shared_experts"]
"""What a layer has, and may have under a scheme of its own."""
ResidentRole = Literal["attention", "shared_experts", "head"]
"""What a quantized matrix outside the experts is."""

META_BLOCK = 128
"""Groups of a row whose 8-bit scales and zeros share one step and offset each; a row's last block may be shorter."""


class HqqScheme(Part):
    """HQQ at 2, 3, 4 or 8 bits, `w = (q - zero) * scale` with one scale and zero per group of inputs."""

    backend: Literal["hqq"] = "hqq"
    bits: Literal[2, 3, 4, 8] = 4
    """Bits a weight, without scales and zeros."""
    group_size: Literal[16, 32, 64, 128, 256] = 64
    """Weights that share one scale and zero, along the input dimension."""
    # Left out of documents where it is 16: those made before it existed keep their digests.
    metadata_bits: Literal[8, 16] = Field(default=16, exclude_if=lambda bits: bits == 16)
    """Bits of each scale and each zero; with 8 they are quantized in turn, along the row."""

    @property
    def label(self) -> str:
        """`2-bit g64`, or `2-bit g16 meta8`."""
        return f"{self.bits}-bit g{self.group_size}" + (" meta8" if self.metadata_bits == 8 else "")


class BitsAndBytesScheme(Part):
    """bitsandbytes' two weight formats; neither has anything to set."""

    backend: Literal["bitsandbytes"] = "bitsandbytes"
    format: Literal["nf4", "int8"]
    """nf4: 4-bit codes of 16 fixed numbers, scaled per 64 inputs; int8: signed bytes, scaled per row."""

    @property
    def bits(self) -> int:
        """Bits a weight, without scales."""
        return 4 if self.format == "nf4" else 8

    @property
    def group_size(self) -> int | None:
        """Weights that share one scale, along the input dimension; None is the whole row."""
        return 64 if self.format == "nf4" else None

    @property
    def label(self) -> str:
        """`nf4` or `int8`."""
        return self.format


class DenseScheme(Part):
    """No quantization: the checkpoint's own numbers."""

    backend: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """`unquantized`."""
        return "unquantized"


Scheme = Annotated[HqqScheme | BitsAndBytesScheme | DenseScheme, Field(discriminator="backend")]
ExpertScheme = Annotated[
    HqqScheme | BitsAndBytesScheme | DenseScheme | AutoBits,
    Field(discriminator="backend"),
    BeforeValidator(auto_backend),
]
"""A scheme, or that one is to be chosen for each layer or expert."""


def _is_dense(scheme: Scheme) -> bool:
    return isinstance(scheme, DenseScheme)


def _is_none(scheme: Scheme | None) -> bool:
    return scheme is None


def scheme_settings(bits: int, group_size: int = 64, metadata_bits: int = 16) -> dict[str, Any]:
    """A scheme by its bits, as a profile has it, not yet validated; 16 keeps the checkpoint's numbers."""
    if bits == 16:
        return {"backend": "none"}
    return {"backend": "hqq", "bits": bits, "group_size": group_size, "metadata_bits": metadata_bits}


class Override(Part):
    """Other schemes for some layers, or another for some of their experts."""

    layers: LayerPattern
    """Decoder layers of the model, from 0: `31`, `0-3`, `0-3,31`."""
    only_experts: ExpertPattern | None = Field(default=None, exclude_if=_is_none)
    """The experts, from 0, of each of these layers that `experts` is for: `0,5-7`; absent: all."""
    experts: Scheme | None = Field(default=None, exclude_if=_is_none)
    """Of these layers' experts; absent: as in the others."""
    attention: Scheme | None = Field(default=None, exclude_if=_is_none)
    """Of their attention."""
    shared_experts: Scheme | None = Field(default=None, exclude_if=_is_none)
    """Of their shared experts."""

    @property
    def schemes(self) -> dict[LayerRole, Scheme]:
        """The roles that it gives another scheme."""
        named: dict[LayerRole, Scheme | None] = {
            "experts": self.experts,
            "attention": self.attention,
            "shared_experts": self.shared_experts,
        }
        return {role: scheme for role, scheme in named.items() if scheme is not None}

    def covers(self, layer: int | None) -> bool:
        """Whether it names this layer."""
        return any(layer in span for span in spans(self.layers))

    def includes(self, expert: int | None) -> bool:
        """Whether it is for this expert of the layers that it names; None: for the layers whole."""
        return self.only_experts is None or any(expert in span for span in spans(self.only_experts))

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.only_experts is not None and (others := [role for role in self.schemes if role != "experts"]):
            raise ValueError(
                f"only_experts is {self.only_experts}; {' and '.join(others)} cannot be of some experts alone: "
                "give that an entry of its own, without only_experts"
            )
        if not self.schemes:
            raise ValueError("it changes nothing: give experts, attention or shared_experts a scheme")
        return self


def _conflicts(overrides: tuple[Override, ...]) -> Iterator[str]:
    """Where two overrides give one layer's matrices different schemes."""
    for (i, one), (j, other) in combinations(enumerate(overrides), 2):
        layer = shared(one.layers, other.layers)
        for role, scheme in one.schemes.items():
            second = other.schemes.get(role, scheme)
            if layer is None or second == scheme:
                continue
            what, remedy = f"{role} of layer {layer}", "name each layer once"
            if one.only_experts is not None or other.only_experts is not None:
                expert = _shared_expert(one, other)
                if expert is None:
                    continue
                what, remedy = f"expert {expert} of layer {layer}", "name each expert of a layer once"
            yield (
                f"entries {i} and {j} contradict each other: {what} would be {scheme.label} "
                f"and {second.label}; {remedy}"
            )


def _shared_expert(one: Override, other: Override) -> int | None:
    """The first expert that both are for; an entry without a pattern is for all."""
    patterns = [pattern for pattern in (one.only_experts, other.only_experts) if pattern is not None]
    return shared(patterns[0], patterns[-1])


def _check_overrides(overrides: tuple[Override, ...]) -> tuple[Override, ...]:
    for conflict in _conflicts(overrides):
        raise ValueError(conflict)
    return overrides


class Quantization(Part):
    """A scheme per role; embeddings, routers and norms always stay as they are (paper, section 3.3)."""

    experts: ExpertScheme = HqqScheme(bits=4, group_size=64)
    """The experts' matrices: nearly all of the model. `{bits: auto, budget: 2.75}` in a profile: chosen by packing."""
    attention: Scheme = HqqScheme(bits=4, group_size=64)
    """The attention's projections: small, read for every token, and sensitive."""
    # Those below are left out of documents where they change nothing: documents made before them keep their digests.
    shared_experts: Scheme = Field(default=DenseScheme(), exclude_if=_is_dense)
    """Matrices of the experts that every token uses, in families that have them."""
    head: Scheme = Field(default=DenseScheme(), exclude_if=_is_dense)
    """The output head; not where the model ties it to the embedding, whose rows are looked up as plain numbers."""
    overrides: Annotated[tuple[Override, ...], AfterValidator(_check_overrides)] = Field(
        default=(), exclude_if=lambda overrides: not overrides
    )
    """Other schemes for some layers or experts: sensitive ones, such as the first and the last, may keep more bits."""

    @property
    def auto(self) -> AutoBits | None:
        """How the experts' bits are to be chosen; None where they are said."""
        return self.experts if isinstance(self.experts, AutoBits) else None

    def chosen(self, experts: Scheme, overrides: tuple[Override, ...]) -> Self:
        """With these in place of `auto`; overrides of other roles stay."""
        return self.model_validate({**dict(self), "experts": experts, "overrides": (*self.overrides, *overrides)})

    @model_validator(mode="after")
    def _chooses_or_says(self) -> Self:
        if self.auto and (said := [o.layers for o in self.overrides if o.experts is not None]):
            raise ValueError(
                f"experts are bits: auto, and an override names a scheme for those of layers {said[0]}: "
                "leave out one of the two"
            )
        return self

    def scheme(self, role: LayerRole | ResidentRole, layer: int | None, expert: int | None = None) -> Scheme:
        """Of the matrices of `role` in a layer, of one `expert` if it is given; layer None: they are in no layer."""
        for override in self.overrides:
            if role in override.schemes and override.covers(layer) and override.includes(expert):
                return next(scheme for name, scheme in override.schemes.items() if name == role)
        assert role != "experts" or self.auto is None, "bits: auto is resolved before anyone asks for a scheme"
        own: Scheme = getattr(self, role)
        return own

    def __str__(self) -> str:
        """A scheme per role; those roles that stay plain by default are named where they do not."""
        roles: dict[str, ExpertScheme] = {"experts": self.experts, "attention": self.attention}
        more: dict[str, Scheme] = {"shared experts": self.shared_experts, "head": self.head}
        roles |= {role: scheme for role, scheme in more.items() if not _is_dense(scheme)}
        parts = [f"{role} {scheme.label}" for role, scheme in roles.items()]
        for override in self.overrides:
            some = f" {override.only_experts}" if override.only_experts else ""
            schemes = [f"{role.replace('_', ' ')}{some} {scheme.label}" for role, scheme in override.schemes.items()]
            parts.append(f"in {override.layers}: {', '.join(schemes)}")
        return "; ".join([", ".join(parts[: len(roles)]), *parts[len(roles) :]])
