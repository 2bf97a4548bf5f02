"""Every choice resolved to numbers for one machine and one model: `plan.json` in an artifact.

Made by `moeflow.planning`, read by the engine, which decides nothing that stands here. Sizes are bytes,
times are seconds.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field

from moeflow.schema.base import Document, Part
from moeflow.schema.profile import (
    HALF_LIFE,
    Activations,
    Dtype,
    Execution,
    HalfLife,
    Policy,
    Predictor,
    Strategy,
)
from moeflow.schema.units import three_digits

__all__ = ["DecodeTime", "MemoryBudget", "Plan", "PlannedCpu", "PlannedPrefetch", "Prediction", "PrefillTime"]

P = TypeVar("P", bound=Part)


class PlannedPrefetch(Part):
    """Guessing, resolved."""

    predictor: Predictor
    depth: int = Field(ge=0)
    """Layers ahead; 0 is off."""
    experts: int = Field(ge=0)
    """Experts per guess."""


class PlannedCpu(Part):
    """The CPU's part of the experts, resolved."""

    threads: int = Field(ge=1)
    share: float = Field(ge=0, le=1)
    """Of the bytes that a step misses, what the CPU computes at first; the rest travels."""
    fixed: bool
    """Whether the share stays; else steps adapt it until CPU and link end together."""
    activations: Activations


class MemoryBudget(Part):
    """Device memory by use; the parts sum to `total`, which is at most `limit`."""

    resident: int
    """Attention, embeddings, norms, routers."""
    kv_cache: int
    slots: int
    """Cached experts."""
    staging: int
    """Buffers that copies land in."""
    stream: int
    """Two whole layers of experts, for prefill."""
    workspace: int
    """Activations, dequantized matrices, logits."""
    total: int
    limit: int


class DecodeTime(Part):
    """Seconds of one decoded token; the parts follow one another."""

    dense: float
    """Attention, shared experts, head: read once from device memory."""
    experts: float
    """Products with the chosen experts, hits and misses alike."""
    launches: float
    """What does not depend on bytes: small kernels, and on a CPU the host's own work."""
    misses: float
    """Copies over the link that nothing hides, while the CPU computes its share."""
    disk: float
    """Reads of misses that lie on the disk."""
    cpu: float = Field(default=0.0, exclude_if=lambda seconds: not seconds)
    """What waits for the CPU alone: handshakes, and all experts where no other computes them."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.dense + self.experts + self.launches + self.misses + self.disk + self.cpu

    def rounded(self) -> Self:
        """To four digits."""
        return _rounded(self)


class PrefillTime(Part):
    """Seconds of a prompt that finds nothing cached; copies and computing overlap."""

    tokens: int
    link: float
    """Every expert over the link."""
    compute: float
    """Unpacking, products, launches."""
    disk: float

    @property
    def total(self) -> float:
        """Until the first token: whatever takes longest."""
        return max(self.link, self.compute, self.disk)

    def rounded(self) -> Self:
        """To four digits."""
        return _rounded(self)


class Prediction(Part):
    """Decode speed from bytes, rates and habits of routing; see `moeflow.planning.cost`."""

    tokens_per_second: float
    low: float
    """With routes that never repeat, guesses of which half are right, and the model's error."""
    high: float
    hit_rate: float
    missed_bytes: int
    """Over the link on demand, per token."""
    guessed_bytes: int
    """Over the link on a guess, per token."""
    wasted_bytes: int
    """The part of them that is not used."""
    read_bytes: int
    """Out of device memory, per token."""
    computed_bytes: int = Field(default=0, exclude_if=lambda nbytes: not nbytes)
    """Multiplied by the CPU where they lie, per token: beside a GPU instead of copied, without one neither cached."""
    hidden: float
    """Seconds of copies that computing hides, per token."""
    decode: DecodeTime
    prefill: PrefillTime
    assumed: tuple[str, ...] = ()
    """What nobody measured on this machine or of this model."""

    @property
    def range(self) -> str:
        """For people: `3.75 to 7.05`."""
        return f"{three_digits(self.low)} to {three_digits(self.high)}"

    @property
    def speed(self) -> str:
        """For people: `5.64 tokens/s (3.75 to 7.05)`."""
        return f"{three_digits(self.tokens_per_second)} tokens/s ({self.range})"


def _rounded(part: P) -> P:
    values = {name: float(f"{getattr(part, name):.4g}") for name in type(part).model_fields if name != "tokens"}
    return part.model_copy(update=values)


class Plan(Document):
    """What the engine does."""

    kind: ClassVar[str] = "plan"

    manifest_digest: str = ""
    """Of the packed model; empty where the plan was made before packing."""
    hardware: str
    """Name of the hardware profile it was made for."""
    device: Literal["cuda", "cpu"]
    dtype: Dtype
    execution: Execution = "host"
    """Who drives a decoding step. The engine falls back to host where a kernel cannot run, and says so."""
    strategy: Strategy
    policy: Policy
    # Both are left out of documents that do not need them: those made before they existed keep their digests.
    half_life: HalfLife = Field(default=HALF_LIFE, exclude_if=lambda uses: uses == HALF_LIFE)
    """Of mix, in uses of experts of a layer."""
    hot_experts: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] = Field(default=(), exclude_if=lambda hot: not hot)
    """Of static: which experts may be cached, per MoE layer, most used first."""
    context_length: int
    cache_slots: tuple[Annotated[int, Field(ge=0)], ...]
    """k, per MoE layer."""
    staging_slots: int = Field(ge=1)
    """Landing buffers beside the cache, shared by all layers of one blob layout."""
    stream_layers: int = Field(ge=0)
    """Whole-layer buffers for prefill: 2, or 0 where prefill must go through the cache."""
    prefetch: PlannedPrefetch
    cpu: PlannedCpu | None = Field(default=None, exclude_if=lambda part: part is None)
    """None: the CPU multiplies nothing beside a GPU, and without one torch computes the experts. Kernels that this
    machine cannot run are left out by the engine, which says so."""
    ram_experts: tuple[Annotated[int, Field(ge=0)], ...]
    """Per MoE layer, how many experts (the first) lie in host memory; the others are read from disk."""
    memory: MemoryBudget
    ram_nbytes: int
    """Host memory for blobs."""
    disk_nbytes: int
    """Blobs that stay on disk."""
    prediction: Prediction | None = None
    """None where the hardware profile lacks a rate that it needs."""
