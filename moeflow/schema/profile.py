"""What the user asks for: one deployment of one model on one kind of machine, `profiles/NAME.yaml`.

Everything but `model` has a default. `auto` is resolved by the planner into a new document, the plan; the
profile itself is never changed.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from moeflow.schema.base import Document, Part
from moeflow.schema.quantization import Quantization
from moeflow.schema.units import AutoCount, AutoSize

__all__ = [
    "Activations", "Cache", "CpuExperts", "CpuUse", "Dtype", "Execution", "HALF_LIFE", "HalfLife", "Memory", "Policy",
    "Predictor", "Prefetch", "Profile", "Strategy",
]  # fmt: skip

Policy = Literal["lru", "lfu", "mix", "static", "learned"]
Predictor = Literal["next-gate", "learned", "none"]
Strategy = Literal["full", "no-prefetch", "no-cache", "naive"]
Execution = Literal["device", "host"]
Dtype = Literal["float32", "bfloat16", "float16"]
CpuExperts = Literal["auto", "off", "on", "only"]
Activations = Literal["fixed16", "int8"]

HALF_LIFE = 128.0  # of a mix; docs/simulator.md has what it was measured on
HalfLife = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class Cache(Part):
    """Experts kept on the device between tokens (paper, section 3.1)."""

    policy: Policy = "lru"
    """Who leaves when a slot is needed: the least recently used (lru), the least frequently used with ageing (lfu), or
    whose uses, weighed by their age, are worth least (mix); static keeps the experts most used in `trace`; learned
    those that the artifact's predictor, from `moeflow train-predictor`, says will be used soonest."""
    experts_per_layer: AutoCount = "auto"
    """k: slots per layer; auto takes what memory allows, and shares it out between layers as `trace` says."""
    # Both are left out of documents that do not need them: those made before they existed keep their digests.
    half_life: HalfLife = Field(default=HALF_LIFE, exclude_if=lambda uses: uses == HALF_LIFE)
    """Of mix: after how many uses of experts of the layer a use is worth half; 1 is lru, a million never forgets."""
    trace: str | None = Field(default=None, exclude_if=lambda path: path is None)
    """Routes that `moeflow trace` recorded with this model: of static, and for slots that differ by layer."""

    @model_validator(mode="after")
    def _has_its_trace(self) -> Self:
        if self.policy == "static" and self.trace is None:
            raise ValueError("policy static keeps the experts most used in a trace: name it as cache.trace")
        return self


class Prefetch(Part):
    """Loading of experts that a later layer will probably use (paper, section 3.2)."""

    predictor: Predictor = "next-gate"
    """next-gate applies the coming layer's router to this layer's hidden states; learned, what
    `moeflow train-predictor` fitted to them."""
    depth: AutoCount = "auto"
    """How many layers ahead are guessed; auto is 1, 0 turns guessing off."""
    experts: AutoCount = "auto"
    """Experts guessed per layer; auto is the model's top-k."""


class Memory(Part):
    """Upper bounds; auto takes what the machine has, less a reserve."""

    vram: AutoSize = "auto"
    """Device memory. Without a GPU: host memory that stands for it (resident weights, KV cache, slots)."""
    ram: AutoSize = "auto"
    """Host memory for expert blobs."""
    disk: AutoSize = "auto"
    """Disk for blobs that do not fit `ram`; they are read when needed. 0 forbids it."""


class CpuUse(Part):
    """What the CPU multiplies: experts that the cache lacks, where they lie in host memory."""

    experts: CpuExperts = "auto"
    """Beside a GPU, misses are shared between link and CPU: on always, off never, auto where it was measured to pay;
    only: the CPU computes all experts, none is cached or guessed. Without a GPU off leaves them to torch."""
    threads: AutoCount = "auto"
    """That multiply; auto is all cores, beside a GPU all but one."""
    activations: Activations = "fixed16"
    """What products take of hidden states: fixed16, 16 bits in fixed point, as on the GPU; int8 is faster and less
    exact, and only for machines without a GPU."""

    @field_validator("experts", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, experts: object) -> object:
        """YAML takes on and off without quotes for truth values."""
        return {True: "on", False: "off"}[experts] if isinstance(experts, bool) else experts

    @field_validator("threads")
    @classmethod
    def _somebody_works(cls, threads: int | str) -> int | str:
        if threads == 0:
            raise ValueError("expected a whole number, 1 or more, or auto; cpu.experts: off leaves the CPU out")
        return threads


class Profile(Document):
    """A deployment."""

    kind: ClassVar[str] = "profile"

    model: str = Field(min_length=1)
    """Hub id, directory of a checkpoint, or `demo`, the model that ships with moeflow."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    hardware: str = "auto"
    """A name in `hardware/`, a path, or auto: probe this machine."""
    quantization: Quantization = Quantization()
    cache: Cache = Cache()
    prefetch: Prefetch = Prefetch()
    memory: Memory = Memory()
    context_length: int = Field(default=4096, ge=1)
    """Tokens of prompt and answer together."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Of activations: auto is bfloat16 on GPUs that have it, float16 on older ones, float32 on the CPU."""
    # Left out of documents where it is auto: those made before it existed keep their digests.
    execution: Literal["device", "host", "auto"] = Field(default="auto", exclude_if=lambda asked: asked == "auto")
    """Who decides what is copied when: device, kernels inside a CUDA graph, wherever all experts are in host memory;
    host, Python, on any device and with any tier."""
    # Left out of documents where it says nothing: those made before it existed keep their digests.
    cpu: CpuUse = Field(default=CpuUse(), exclude_if=lambda use: use == CpuUse())
    strategy: Strategy = "full"
    """The paper's ablation: full; without guesses; without cache and guesses; naive, whole layers."""
