"""What a benchmark measured: one run of `moeflow bench`, on one machine, of one or more rows.

A figure that was not measured is None, never 0. Only what was measured is stored; what follows from it (rates, ratios
to the machine's limits) is computed by properties here, so that no two figures of a document can disagree. Sizes
are bytes, times seconds, rates bytes a second; per token means per decoded token, over all sequences of the batch.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moeflow.schema.base import Document, Part
from moeflow.schema.profile import Strategy

__all__ = ["Environment", "Limits", "BenchmarkRow", "Benchmark", "Compared", "Routing"]

Routing = Literal["model", "uniform", "markov", "recorded"]
Compared = Literal["cpu", "link", "both"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Environment(Part):
    """Where it ran, without anything that names one machine among its kind."""

    gpu: str | None
    """As the driver names it; None where there is none or it was not used."""
    gpu_memory: Count | None = None
    cpu: str
    cores: int = Field(ge=1)
    ram: Count
    driver: str | None = None
    cuda: str | None = None
    """That torch was built for."""
    python: str
    torch: str
    transformers: str
    moeflow: str
    commit: str | None = None
    """Of moeflow's checkout, with `+changes` where files differ from it."""


class Limits(Part):
    """The machine's own rates, measured in the same run."""

    link_peak: Positive | None = None
    """The copy engine's, from page-locked host memory in copies of 1 GiB."""
    memory_bandwidth: Positive | None = None
    """Device memory, reading."""
    host_read: Positive | None = None
    """Host memory, read by all cores."""


class BenchmarkRow(Part):
    """One configuration and what it did."""

    model: str
    synthetic: bool = False
    """Random weights in the model's shapes."""
    experts: int = Field(ge=1)
    """Per layer."""
    top_k: int = Field(ge=1)
    expert_scheme: str
    """The quantization's label, such as `2-bit g64`."""
    attention_scheme: str
    strategy: Strategy
    """Row of the paper's ablation."""
    execution: Literal["device", "host"]
    """Whether the device drives a decode step as a graph, or the host from layer to layer."""
    k: Amount
    """Cached experts per layer; the mean where layers differ."""
    routing: Routing
    experts_on: Compared | None = None
    """Who takes experts that the device lacks, where rows compare that: the CPU, which computes all; the link, which
    brings them; or both, which share them."""
    recall: Share | None = None
    """Of the guesses, where routes were forced; None where the model's own gate guessed, or nothing did."""
    prompt_tokens: int = Field(ge=0)
    tokens: int = Field(ge=1)
    """Decoded, per sequence."""
    batch: int = Field(ge=1)
    note: str = ""
    """What a reader must know, such as why the host drives."""

    tokens_per_second: Positive | None = None
    """Decode speed over all sequences."""
    time_to_first_token: Positive | None = None
    """With what a prefill before left in the cache."""
    cold_time_to_first_token: Positive | None = None
    """With an empty cache: every expert travels."""
    hit_rate: Share | None = None
    """Share of expert uses that found the expert cached; None where no cache was asked."""
    missed_bytes: Amount | None = None
    """Over the link on demand, per token."""
    guessed_bytes: Amount | None = None
    """Over the link on a guess, per token."""
    wasted_bytes: Amount | None = None
    """The part of `guessed_bytes` that was never used."""
    streamed_bytes: Amount | None = None
    """Over the link in whole layers, per token."""
    computed_bytes: Amount | None = None
    """By the CPU where they lie, beside a device, per token; None where the plan gave it no part."""
    read_bytes: Amount | None = None
    """Out of device memory, per token."""
    prefill_bytes: Amount | None = None
    """Over the link before the first token, in all."""
    cold_prefill_bytes: Amount | None = None
    """The same with an empty cache."""
    guesses: Count | None = None
    """Copies started on a guess, in all."""
    guesses_used: Count | None = None
    memory_planned: Count | None = None
    """Device memory that the plan states."""
    memory_in_use: Count | None = None
    """Device memory taken, at its peak."""
    host_planned: Count | None = None
    """Host memory that the blobs take."""
    host_in_use: Count | None = None

    @property
    def seconds_per_token(self) -> float | None:
        """Of one sequence: the time of a decode step."""
        return self.batch / self.tokens_per_second if self.tokens_per_second else None

    @property
    def moved_bytes(self) -> float | None:
        """All over the link, per token; None if nothing of it was measured."""
        known = [n for n in (self.missed_bytes, self.guessed_bytes, self.streamed_bytes) if n is not None]
        return sum(known) if known else None

    @property
    def link_rate(self) -> float | None:
        """Achieved: bytes moved per token, over the time per token."""
        return _product(self.moved_bytes, self.tokens_per_second)

    @property
    def cpu_rate(self) -> float | None:
        """Achieved: bytes that the CPU computes per token, over the time per token."""
        return _product(self.computed_bytes, self.tokens_per_second)

    @property
    def cpu_share(self) -> float | None:
        """Of the bytes that were missed, what the CPU computed; None where nothing was missed."""
        if self.computed_bytes is None or self.missed_bytes is None:
            return None
        return _ratio(self.computed_bytes, self.computed_bytes + self.missed_bytes)

    @property
    def memory_rate(self) -> float | None:
        """Achieved: bytes read per token, over the time per token."""
        return _product(self.read_bytes, self.tokens_per_second)

    @property
    def memory_ratio(self) -> float | None:
        """Device memory in use over planned; 1 is as planned."""
        return _ratio(self.memory_in_use, self.memory_planned)


class Benchmark(Document):
    """One run."""

    kind: ClassVar[str] = "benchmark"

    command: str
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    """UTC, such as 2026-11-23T14:05:00Z."""
    environment: Environment
    limits: Limits = Limits()
    rows: tuple[BenchmarkRow, ...] = Field(min_length=1)

    def link_efficiency(self, row: BenchmarkRow) -> float | None:
        """The row's achieved link rate over the copy engine's peak."""
        return _ratio(row.link_rate, self.limits.link_peak)

    def memory_efficiency(self, row: BenchmarkRow) -> float | None:
        """The row's achieved memory rate over the measured bandwidth."""
        return _ratio(row.memory_rate, self.limits.memory_bandwidth)

    def cpu_efficiency(self, row: BenchmarkRow) -> float | None:
        """The row's bytes by the CPU a second over what all cores read from host memory."""
        return _ratio(row.cpu_rate, self.limits.host_read)

    def over(self, row: BenchmarkRow, other: Compared) -> float | None:
        """The row's speed over that of the row that differs in `experts_on` alone, which is `other`; None without."""
        if row.experts_on is None:
            return None
        found = (r for r in self.rows if r.experts_on == other and _told_apart_by_nothing_else(row, r))
        return _ratio(row.tokens_per_second, next((r.tokens_per_second for r in found), None))

    def prefill_excess(self, row: BenchmarkRow) -> float | None:
        """Time to first token over the time that its bytes take at the copy engine's peak; 1 is the link's limit."""
        return _ratio(_product(row.time_to_first_token, self.limits.link_peak), row.prefill_bytes)

    def cold_prefill_excess(self, row: BenchmarkRow) -> float | None:
        """As `prefill_excess`, with an empty cache."""
        return _ratio(_product(row.cold_time_to_first_token, self.limits.link_peak), row.cold_prefill_bytes)


def _told_apart_by_nothing_else(one: BenchmarkRow, other: BenchmarkRow) -> bool:
    """Of what was asked for; k and guesses follow from who takes the experts."""
    asked = ("model", "expert_scheme", "attention_scheme", "strategy", "routing", "prompt_tokens", "batch")
    return all(getattr(one, name) == getattr(other, name) for name in asked)


def _product(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first * second


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
