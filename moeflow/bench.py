"""Measures decoding and prefill as the engine does them, beside the limits of the machine from the same run.

The paper's four rows differ in one switch each; a fifth has every expert cached. Routes can be forced, since a model
with random weights routes like no trained one; then the recall of guesses is a setting, and every row says so. Times
are wall clock over whole runs, after the device has finished; nothing is modelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch

from moeflow.artifact.reader import Artifact
from moeflow.decoding import decode
from moeflow.engine import Engine
from moeflow.errors import UsageError
from moeflow.generation import Passes, Sampler
from moeflow.kernels.launcher import Launcher
from moeflow.model.linear import PackedLinear
from moeflow.model.memory import release_memory
from moeflow.model.routes import ForcedRoutes
from moeflow.offload.routing import guesses, markov, recorded, uniform
from moeflow.offload.store import HostStore
from moeflow.offload.traffic import Traffic
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.probe.bandwidth import copy_rate, device_rate, link_rate, read_rate
from moeflow.progress import Progress, silent
from moeflow.schema import BenchmarkRow, HardwareProfile, Limits, Manifest, Plan, Profile
from moeflow.schema.benchmark import Compared, Routing
from moeflow.schema.profile import CpuExperts, Strategy

__all__ = ["COMPARED", "Settings", "measure_limits", "run_rows"]

GIB = 1 << 30
PREFILLS = 3
STRATEGIES: tuple[Strategy, ...] = ("full", "no-prefetch", "no-cache", "naive")
COMPARED: dict[Compared, CpuExperts] = {"cpu": "only", "link": "off", "both": "on"}
"""Rows of a comparison of who takes the experts that the device lacks, as a profile's `cpu.experts` says it."""


@dataclass(frozen=True)
class Settings:
    """What to run."""

    profile: Profile
    experts_per_layer: int | None = None
    """k; None is the planner's."""
    routing: Routing = "model"
    recall: float | None = None
    """Of forced guesses."""
    trace: Path | None = None
    tokens: int = 64
    prompt: int = 512
    warm_up: int = 16
    """Decoded and not counted, so that the cache holds what it would hold."""
    seed: int = 0
    stall: int = 0
    """Cycles that the GPU idles in every layer; stretches computation."""
    rows: Sequence[Strategy] = ("full",)
    compare: Sequence[Compared] = ()
    """Each row once for each of these, who takes the experts that the device lacks; nothing: as the profile says."""
    all_hits: bool = False
    """Also a row with every expert cached."""
    copy_engine: bool = True
    """Whether large copies are the copy engine's; else kernels copy all."""
    launcher: Launcher | None = field(default=None, repr=False)
    forced: Callable[[torch.device], ForcedRoutes] | None = field(default=None, repr=False)
    """Routes, guesses and scores of whoever made them, in place of those that `routing` names."""


def measure_limits(progress: Progress = silent) -> Limits:
    """The link's peak in copies of 1 GiB, and both memories' bandwidth; on a CPU what stands for them."""
    host = read_rate(progress=progress).rate
    if torch.cuda.is_available():
        link, memory = link_rate(GIB, progress).rate, device_rate(GIB, progress).rate
        return Limits(link_peak=link, memory_bandwidth=memory, host_read=host)
    return Limits(link_peak=copy_rate(progress=progress).rate, memory_bandwidth=host, host_read=host)


def run_rows(
    artifact: Artifact, hardware: HardwareProfile, *settings: Settings, progress: Progress = silent
) -> Iterator[BenchmarkRow]:
    """Run every row of all `settings`; blobs are loaded once.

    Raises:
        UsageError: settings contradict each other.
        CapacityError: the rows do not fit the machine.
    """
    planned = [(one, *plan) for one in settings for plan in _plans(artifact.manifest, hardware, one)]
    plans = [plan for _, plan, _ in planned]
    if len({plan.ram_experts for plan in plans}) > 1:
        raise UsageError("the rows keep different experts in host memory; raise memory.ram, or run them one by one")
    before = psutil.Process().memory_info().rss
    store = HostStore(artifact, plans[0].ram_experts, pin=plans[0].device == "cuda", progress=progress)
    try:
        for one, plan, compared in planned:
            yield _row(artifact, plan, one, store, before).model_copy(update={"experts_on": compared})
    finally:
        store.close()


def _plans(manifest: Manifest, hardware: HardwareProfile, settings: Settings) -> Iterator[tuple[Plan, Compared | None]]:
    """One for each row, with what it is compared as."""
    if settings.recall is not None and settings.routing == "model":
        raise UsageError("--recall is of forced guesses; the model's own gate guesses where routing is `model`")
    if settings.compare and hardware.gpu is None and settings.profile.execution != "device":
        raise UsageError("--compare is of CPU and link beside a GPU; without one the CPU computes all experts anyway")
    rows = [(row, settings.experts_per_layer) for row in settings.rows]
    if settings.all_hits:
        rows.append(("no-prefetch", max(layer.experts for layer in manifest.layers)))
    for row, k in rows:
        for compared in settings.compare or (None,):
            yield _plan(manifest, hardware, _compared(settings.profile, compared), row, k), compared


def _compared(profile: Profile, compared: Compared | None) -> Profile:
    if compared is None:
        return profile
    cpu = profile.cpu.model_copy(update={"experts": COMPARED[compared]})
    return profile.model_copy(update={"cpu": cpu})


def _plan(manifest: Manifest, hardware: HardwareProfile, profile: Profile, row: Strategy, k: int | None) -> Plan:
    cache = profile.cache if k is None else profile.cache.model_copy(update={"experts_per_layer": k})
    changed = profile.model_copy(update={"strategy": row, "cache": cache})
    if row == "naive" and changed.execution == "device":
        changed = changed.model_copy(update={"execution": "auto"})
    return make_plan(changed, ModelSizes.of_manifest(manifest), hardware)


def _row(artifact: Artifact, plan: Plan, settings: Settings, store: HostStore, host_before: int) -> BenchmarkRow:
    manifest = artifact.manifest
    if plan.device == "cuda":
        release_memory(torch.device("cuda"))  # what earlier rows left is not this one's
        torch.cuda.reset_peak_memory_stats()
    routes = _routes(manifest, plan, settings)
    with Engine(
        artifact, plan, launcher=settings.launcher, routes=routes, store=store, mover=settings.copy_engine
    ) as engine:
        run = _Run(engine, settings)
        run.prefill()  # thrown away, for what is compiled and allocated in it
        cold, cold_traffic = run.typical_prefill(engine.empty_cache)
        first, first_traffic = run.typical_prefill()
        run.decode(_warm_up(plan, settings))
        tokens = (
            settings.tokens if plan.strategy != "naive" else max(1, settings.tokens // 4)
        )  # each takes whole layers
        before, wasted_before = engine.traffic, engine.wasted_bytes
        seconds = run.decode(tokens)
        decode = engine.traffic.since(before)
        wasted = None if engine.wasted_bytes is None or wasted_before is None else engine.wasted_bytes - wasted_before
        reads = _read_bytes(manifest, engine)
        note = engine.note or ("" if settings.copy_engine else "all copies by kernels")
        execution = engine.execution.partition("-")[0]
        in_use = torch.cuda.max_memory_reserved() if plan.device == "cuda" else None
    per_token = 1 / tokens
    guessing = plan.prefetch.depth > 0
    forced_guess = guessing and settings.routing != "model"
    return BenchmarkRow.model_validate(
        {
            **_model(manifest),
            "strategy": plan.strategy,
            "execution": execution,
            "k": sum(plan.cache_slots) / len(plan.cache_slots),
            "routing": settings.routing,
            "recall": settings.recall if forced_guess else None,
            "prompt_tokens": settings.prompt,
            "tokens": tokens,
            "batch": 1,
            "note": note,
            "tokens_per_second": tokens / seconds,
            "time_to_first_token": first,
            "cold_time_to_first_token": cold,
            "hit_rate": decode.hit_rate if decode.uses and plan.strategy in ("full", "no-prefetch") else None,
            "missed_bytes": decode.missed_bytes * per_token,
            "guessed_bytes": decode.guessed_bytes * per_token if guessing else None,
            "wasted_bytes": wasted * per_token if guessing and wasted is not None else None,
            "streamed_bytes": decode.streamed_bytes * per_token,
            "computed_bytes": decode.computed_bytes * per_token if plan.cpu and execution == "device" else None,
            "read_bytes": reads - (decode.computed_bytes * per_token if execution == "device" else 0),
            "prefill_bytes": first_traffic.moved_bytes,
            "cold_prefill_bytes": cold_traffic.moved_bytes,
            "guesses": decode.guesses if guessing else None,
            "guesses_used": decode.guesses_used if guessing else None,
            "memory_planned": plan.memory.total,
            "memory_in_use": in_use,
            "host_planned": plan.ram_nbytes,
            "host_in_use": max(0, psutil.Process().memory_info().rss - host_before),
        }
    )


def _model(manifest: Manifest) -> dict[str, object]:
    """What a row says of the model."""
    return {
        "model": manifest.model.source,
        "synthetic": not manifest.files,
        "experts": max(layer.experts for layer in manifest.layers),
        "top_k": manifest.model.top_k,
        "expert_scheme": manifest.quantization.experts.label,
        "attention_scheme": manifest.quantization.attention.label,
    }


def _warm_up(plan: Plan, settings: Settings) -> int:
    """Enough tokens that every slot was filled, where all experts are to be hits."""
    return settings.warm_up * 4 if max(plan.cache_slots) >= max(plan.ram_experts) else settings.warm_up


def _read_bytes(manifest: Manifest, engine: Engine) -> int:
    """Bytes that a token reads from device memory: its experts and all resident weights, of the embedding one row."""
    top_k, layers = manifest.model.top_k, enumerate(manifest.layers)
    experts = sum(top_k * manifest.starts(i)[-1] // entry.experts for i, entry in layers)  # of a mixed layer, the mean
    model = engine.model
    packed = sum(s.nbytes for m in model.modules() if isinstance(m, PackedLinear) for s in m.matrix.segments)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = any(parameter is embedding.weight for parameter in head.parameters())
    plain = sum(p.nbytes for p in model.parameters() if tied or p is not embedding.weight)  # tied ones come once
    return experts + packed + int(plain)


def _routes(manifest: Manifest, plan: Plan, settings: Settings) -> Callable[[torch.device], ForcedRoutes] | None:
    """Forced routes for the engine's device; None where the model's own router decides."""
    if settings.routing == "model" or settings.forced is not None:
        return settings.forced
    layers, top_k = len(manifest.layers), manifest.model.top_k
    experts = min(layer.experts for layer in manifest.layers)
    count = settings.tokens + 4 * settings.warm_up
    if settings.routing == "recorded":
        if settings.trace is None:
            raise UsageError("recorded routing needs a trace: --trace FILE")
        table = recorded(settings.trace)
        if table.shape[1:] != (layers, top_k) or int(table.max()) >= experts:
            raise UsageError(f"{settings.trace}: routes of another model than {manifest.model.source}")
    else:
        source = uniform if settings.routing == "uniform" else markov
        table = source(layers, experts, top_k, count, settings.seed)
    guessed = None
    if plan.prefetch.depth:
        guessed = guesses(table, experts, 1.0 if settings.recall is None else settings.recall, settings.seed + 1)

    def tensors(device: torch.device) -> ForcedRoutes:
        ids = torch.from_numpy(table.astype(np.int64)).to(device)
        said = None if guessed is None else torch.from_numpy(guessed.astype(np.int64)).to(device)
        return ForcedRoutes(ids, said, settings.stall)

    return tensors


class _Run:
    """One engine's run: a prompt, then tokens."""

    def __init__(self, engine: Engine, settings: Settings):
        self._engine = engine
        self._prompt = np.random.default_rng(settings.seed).integers(0, engine.vocabulary, settings.prompt).tolist()
        self._session = engine.session()

    def prefill(self) -> tuple[float, Traffic]:
        """Seconds to the first token, and what the link carried for it."""
        self._session = self._engine.session()
        before = self._engine.traffic  # waits for the device
        begin = time.perf_counter()
        self._choice = self._engine.choice(Sampler(0.0)(self._session.prefill(self._prompt)))
        self._choice.read()
        seconds = time.perf_counter() - begin
        return seconds, self._engine.traffic.since(before)

    def typical_prefill(self, before: Callable[[], None] = lambda: None) -> tuple[float, Traffic]:
        """The median of a few, each after `before`: a busy host delays some of them."""
        runs = []
        for _ in range(PREFILLS):
            before()
            runs.append(self.prefill())
        return sorted(runs, key=lambda run: run[0])[PREFILLS // 2]

    def decode(self, tokens: int) -> float:
        """Seconds for so many tokens; each is read by the host, as text needs it."""
        begin = time.perf_counter()
        passes = Passes(self._engine, self._session, Sampler(0.0))
        for choice in decode(passes.advance, self._choice, tokens, passes.ahead):
            choice.read()
            self._choice = choice
        return time.perf_counter() - begin
