"""Every choice resolved to numbers for one machine and one model: `plan.json` in an artifact.

Made by `moeflow.planning`, read by the engine, which decides nothing that stands here. Sizes are bytes,
times are seconds.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moeflow.schema.base import Document, Part
from moeflow.schema.profile import Dtype, Execution, Policy, Predictor, Strategy

__all__ = ["PlannedPrefetch", "MemoryBudget", "Prediction", "Plan"]


class PlannedPrefetch(Part):
    """Guessing, resolved."""

    predictor: Predictor
    depth: int = Field(ge=0)
    """Layers ahead; 0 is off."""
    experts: int = Field(ge=0)
    """Experts per guess."""


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


class Prediction(Part):
    """An upper bound on decode speed from bytes and rates alone; see `moeflow.planning.cost`."""

    tokens_per_second: float
    hit_rate: float
    """Assuming that every expert is as likely as any other."""
    missed_bytes: int
    """Over the link, per token."""
    read_bytes: int
    """Out of device memory, per token."""
    link_seconds: float
    disk_seconds: float
    """For the misses that lie on disk."""
    memory_seconds: float


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
    context_length: int
    cache_slots: tuple[Annotated[int, Field(ge=0)], ...]
    """k, per MoE layer."""
    staging_slots: int = Field(ge=1)
    """Landing buffers beside the cache, shared by all layers of one blob layout."""
    stream_layers: int = Field(ge=0)
    """Whole-layer buffers for prefill: 2, or 0 where prefill must go through the cache."""
    prefetch: PlannedPrefetch
    ram_experts: tuple[Annotated[int, Field(ge=0)], ...]
    """Per MoE layer, how many experts (the first) lie in host memory; the others are read from disk."""
    memory: MemoryBudget
    ram_nbytes: int
    """Host memory for blobs."""
    disk_nbytes: int
    """Blobs that stay on disk."""
    prediction: Prediction | None = None
    """None where the hardware profile lacks a rate that it needs."""
