"""The stage offload-plan: profile, model sizes and hardware in, a plan out.

Device memory goes first to what must be there (resident weights, KV cache, landing buffers, workspace), then
to the two layer buffers of prefill, and all that is left to cache slots, evenly and then one more in some layers. Who
drives decides how much workspace there must be, and whether there is room decides who drives: every way is laid out,
and the best that fits is taken.
Whatever the profile fixes is taken as it is, or refused with the numbers that would fit.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from moeflow.errors import CapacityError, DocumentError
from moeflow.planning.cost import Running, predict
from moeflow.planning.fitting import Fit, fit_of
from moeflow.planning.guessing import landing_buffers
from moeflow.planning.sharing import in_place, planned_cpu, without_slots
from moeflow.planning.sizes import ITEM_SIZE, LayerSize, ModelSizes
from moeflow.planning.workspace import PREFILL_CHUNK, workspace
from moeflow.schema import HardwareProfile, MemoryBudget, Plan, PlannedPrefetch, Profile
from moeflow.schema.profile import Dtype, Execution
from moeflow.schema.units import format_size

__all__ = ["make_plan", "PREFILL_CHUNK"]

LEAST_CAPABILITY = 7.5  # of the kernels
CUDA_RESERVE = 1 << 30  # the driver's context, libraries and fragmentation
HOST_RESERVE = 2 << 30  # the system and Python
HOST_SHARE = 0.9  # of what is left
FEW_TOKENS = 8  # whose experts the kernels multiply in one pass
LANDING_SHARE = 64  # of all experts: landing buffers for short prompts that take no more come before slots


@dataclass(frozen=True)
class _Fixed:
    """Device memory that does not depend on the number of slots, of one way to run."""

    execution: Execution
    resident: int
    kv_cache: int
    buffers: int
    """That copies land in."""
    staging: int
    """Their bytes."""
    stream: int
    workspace: int

    @property
    def total(self) -> int:
        return self.resident + self.kv_cache + self.staging + self.stream + self.workspace


def make_plan(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile, manifest_digest: str = "") -> Plan:
    """Resolve every `auto` of `profile` for this model on this machine.

    Raises:
        CapacityError: the machine has less memory than the profile asks for, or than the model needs.
        DocumentError: the profile contradicts the model.
    """
    placed = in_place(profile, sizes, hardware)
    plan = _resolved(placed, sizes, hardware, manifest_digest, streams=False) if placed is not None else None
    if plan is not None and not plan.disk_nbytes:
        return plan
    return _resolved(without_slots(profile, hardware), sizes, hardware, manifest_digest)


def _resolved(
    profile: Profile, sizes: ModelSizes, hardware: HardwareProfile, manifest_digest: str, streams: bool = True
) -> Plan:
    """A plan; `streams`: with buffers for whole layers, where they fit."""
    dtype = _dtype(profile, hardware)
    context = min(profile.context_length, sizes.max_context)
    prefetch = _prefetch(profile, sizes)
    limit = _device_limit(profile, hardware)
    ways = _ways(profile, sizes, hardware, dtype, context, prefetch, limit)
    ways = ways if streams else ways[-1:]
    fixed, slots = _choose(ways, profile, sizes, hardware, limit)
    if hardware.gpu is not None:
        fixed, slots = _fill(profile, sizes, prefetch, fixed, slots, limit)
    fit = fit_of(profile.cache, len(sizes.layers), max(layer.experts for layer in sizes.layers), sizes.top_k)
    if fit is not None and profile.cache.experts_per_layer == "auto":
        slots = _shared_out(sizes, fit, slots)
    slot_bytes = _slot_bytes(sizes, slots)
    ram_experts = _ram_experts(profile, sizes, hardware, fixed.total + slot_bytes)
    _check_execution(profile, sizes, fixed, ram_experts)
    in_ram = sum(layer.of_first(n) for layer, n in zip(sizes.layers, ram_experts, strict=True))
    guessed = prefetch.experts if prefetch.depth else 0
    running = Running(slots, ram_experts, profile.strategy, fixed.execution, guessed)
    running = replace(running, cpu=planned_cpu(profile, sizes, hardware, running))
    return Plan(
        manifest_digest=manifest_digest,
        hardware=hardware.name,
        device=hardware.device,
        dtype=dtype,
        execution=fixed.execution,
        strategy=profile.strategy,
        policy=profile.cache.policy,
        half_life=profile.cache.half_life,
        hot_experts=tuple(hot[:k] for hot, k in zip(fit.rule.hot, slots, strict=False)) if fit is not None else (),
        context_length=context,
        cache_slots=slots,
        staging_slots=fixed.buffers,
        stream_layers=2 if fixed.stream else 0,
        prefetch=prefetch,
        cpu=running.cpu,
        ram_experts=ram_experts,
        memory=MemoryBudget(
            resident=fixed.resident,
            kv_cache=fixed.kv_cache,
            slots=slot_bytes,
            staging=fixed.staging,
            stream=fixed.stream,
            workspace=fixed.workspace,
            total=fixed.total + slot_bytes,
            limit=limit,
        ),
        ram_nbytes=in_ram,
        disk_nbytes=sizes.expert_nbytes - in_ram,
        prediction=predict(sizes, hardware, running),
    )


def _ways(
    profile: Profile,
    sizes: ModelSizes,
    hardware: HardwareProfile,
    dtype: Dtype,
    context: int,
    prefetch: PlannedPrefetch,
    limit: int,
) -> list[_Fixed]:
    """The ways to run, best first: device-driven, then host-driven with and without layer buffers for prefill.

    The device drives where kernels reach all blobs and prefill has its two buffers, which may take half of what the
    other fixed parts leave; naive offloading is made of them, and the host's.
    """
    item = ITEM_SIZE[dtype]
    each = _landing_nbytes(sizes)
    least = landing_buffers(sizes.top_k, prefetch.depth, prefetch.experts)
    several = max(least, _for_few_tokens(sizes, prefetch))
    cheap = (several - least) * each <= sizes.expert_nbytes // LANDING_SHARE

    def way(execution: Execution, stream: int) -> _Fixed:
        buffers = several if execution == "device" and cheap else least
        return _Fixed(
            execution=execution,
            resident=sizes.resident_packed + sizes.resident_dense * item // ITEM_SIZE[sizes.dtype],
            kv_cache=sizes.kv_values_per_token * context * item,
            buffers=buffers,
            staging=buffers * each,
            stream=stream,
            workspace=workspace(sizes, hardware, dtype, context, execution),
        )

    buffers = 2 * max(layer.nbytes for layer in sizes.layers)
    if profile.strategy == "naive":
        return [way("host", buffers)]
    able = hardware.gpu is not None and float(hardware.gpu.compute_capability) >= LEAST_CAPABILITY
    able = able and _in_ram(profile, sizes, hardware)
    streamed: list[Execution] = (
        ["device"] if profile.execution == "device" or (profile.execution == "auto" and able) else []
    )
    ways = [way(execution, buffers) for execution in [*streamed, "host"]]
    return [w for w in ways if w.stream <= (limit - w.total + w.stream) // 2] + [way("host", 0)]


def _choose(
    ways: list[_Fixed], profile: Profile, sizes: ModelSizes, hardware: HardwareProfile, limit: int
) -> tuple[_Fixed, tuple[int, ...]]:
    """The first way that fits, with its slots; those that were asked for come before layer buffers."""
    for fixed in ways:
        slots = _slots(profile, sizes, hardware, limit - fixed.total)
        if fixed.total + _slot_bytes(sizes, slots) <= limit:
            return fixed, slots
    raise CapacityError(_too_much(profile, sizes, min(ways, key=lambda fixed: fixed.total), limit))


def _slot_bytes(sizes: ModelSizes, slots: tuple[int, ...]) -> int:
    """Each slot as large as its layer's largest blob."""
    return sum(layer.blob_nbytes * k for layer, k in zip(sizes.layers, slots, strict=True))


def _check_execution(profile: Profile, sizes: ModelSizes, fixed: _Fixed, ram_experts: tuple[int, ...]) -> None:
    in_ram = all(n == layer.experts for n, layer in zip(ram_experts, sizes.layers, strict=True))
    if profile.execution == "device" and not (fixed.execution == "device" and in_ram):
        raise DocumentError(
            "execution is device; that needs all experts in host memory, room for two whole layers on the device "
            "and a strategy other than naive: raise memory.ram or memory.vram, or set execution to auto"
        )


def _dtype(profile: Profile, hardware: HardwareProfile) -> Dtype:
    if profile.dtype != "auto":
        return profile.dtype
    if hardware.gpu is None:
        return "float32"  # CPUs without AMX emulate 16-bit arithmetic
    return "bfloat16" if float(hardware.gpu.compute_capability) >= 8.0 else "float16"


def _prefetch(profile: Profile, sizes: ModelSizes) -> PlannedPrefetch:
    asked = profile.prefetch
    if asked.predictor == "none" or profile.strategy != "full":
        return PlannedPrefetch(predictor="none", depth=0, experts=0)
    depth = min(1 if asked.depth == "auto" else asked.depth, len(sizes.layers) - 1)
    experts = sizes.top_k if asked.experts == "auto" else asked.experts
    most = min(layer.experts for layer in sizes.layers)
    if experts > most:
        raise DocumentError(f"prefetch.experts is {experts}; the model has {most} experts per layer")
    return PlannedPrefetch(predictor=asked.predictor, depth=depth, experts=experts if depth else 0)


def _device_limit(profile: Profile, hardware: HardwareProfile) -> int:
    has = hardware.gpu.memory if hardware.gpu else hardware.ram
    what = "device memory" if hardware.gpu else "memory"
    if profile.memory.vram == "auto":
        return has - CUDA_RESERVE if hardware.gpu else max(0, has - HOST_RESERVE) // 2
    if profile.memory.vram > has:
        raise CapacityError(
            f"memory.vram is {format_size(profile.memory.vram)}; {hardware.name} has {format_size(has)} of {what}: "
            "lower it or set it to auto"
        )
    return profile.memory.vram


def _fill(
    profile: Profile,
    sizes: ModelSizes,
    prefetch: PlannedPrefetch,
    fixed: _Fixed,
    slots: tuple[int, ...],
    limit: int,
) -> tuple[_Fixed, tuple[int, ...]]:
    """Give what no whole k fills to slots of some layers, and what is left then to landing buffers."""
    if profile.cache.experts_per_layer == "auto" and profile.strategy in ("full", "no-prefetch"):
        slots = _with_spare(sizes, slots, limit - fixed.total - _slot_bytes(sizes, slots))
    if fixed.execution == "device":
        each, spare = _landing_nbytes(sizes), limit - fixed.total - _slot_bytes(sizes, slots)
        buffers = max(fixed.buffers, min(_for_few_tokens(sizes, prefetch), fixed.buffers + spare // each))
        fixed = replace(fixed, buffers=buffers, staging=buffers * each)
    return fixed, slots


def _landing_nbytes(sizes: ModelSizes) -> int:
    """Of one landing buffer, for every layout that the model has."""
    return sum(nbytes for _, nbytes in {(layer.layout, layer.blob_nbytes) for layer in sizes.layers})


def _for_few_tokens(sizes: ModelSizes, prefetch: PlannedPrefetch) -> int:
    """Landing buffers with which short prompts fetch only the experts that they need."""
    return min(FEW_TOKENS * sizes.top_k, max(layer.experts for layer in sizes.layers)) + prefetch.experts


def _with_spare(sizes: ModelSizes, slots: tuple[int, ...], spare: int) -> tuple[int, ...]:
    """One slot more in as many layers as `spare` bytes hold, spread over the model's depth."""
    layers = len(sizes.layers)
    more = min(layers, spare // max(layer.blob_nbytes for layer in sizes.layers))
    extra = ((i + 1) * more // layers - i * more // layers for i in range(layers))
    return tuple(min(y.experts, k + one) for one, k, y in zip(extra, slots, sizes.layers, strict=True))


def _shared_out(sizes: ModelSizes, fit: Fit, slots: tuple[int, ...]) -> tuple[int, ...]:
    """The room of `slots`, by layer as the trace asks for it."""
    each, most = [layer.blob_nbytes for layer in sizes.layers], [layer.experts for layer in sizes.layers]
    return tuple(fit.quotas(slots, each, most))


def _slots(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile, free: int) -> tuple[int, ...]:
    """k per layer."""
    if profile.strategy in ("no-cache", "naive"):
        return (0,) * len(sizes.layers)
    asked = profile.cache.experts_per_layer
    most = min(layer.experts for layer in sizes.layers)
    if asked != "auto":
        if asked > most:
            raise DocumentError(f"cache.experts_per_layer is {asked}; the model has {most} experts per layer")
        return (asked,) * len(sizes.layers)
    fitting = max(0, free) // sum(layer.blob_nbytes for layer in sizes.layers)
    if hardware.gpu is None:
        most = most // 2  # slots on a CPU only stand for a GPU's: the experts are in memory anyway
    return (min(most, fitting),) * len(sizes.layers)


def _too_much(profile: Profile, sizes: ModelSizes, fixed: _Fixed, limit: int) -> str:
    per_k = sum(layer.blob_nbytes for layer in sizes.layers)
    needed = (
        f"{format_size(fixed.resident)} of resident weights, {format_size(fixed.kv_cache)} of KV cache, "
        f"{format_size(fixed.staging + fixed.stream)} of buffers, {format_size(fixed.workspace)} of workspace"
    )
    if fixed.total > limit:
        return (
            f"the model needs {needed}: {format_size(fixed.total)} of device memory before the first cached expert, "
            f"the limit is {format_size(limit)}; lower context_length or the bits of quantization.attention"
        )
    return (
        f"cache.experts_per_layer is {profile.cache.experts_per_layer}; each takes {format_size(per_k)} beside "
        f"{needed}, the limit is {format_size(limit)}: {(limit - fixed.total) // per_k} would fit"
    )


def _in_ram(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile) -> bool:
    """Whether host memory holds every expert; for machines with a GPU."""
    return sizes.expert_nbytes <= _ram_budget(profile, hardware, 0)


def _ram_budget(profile: Profile, hardware: HardwareProfile, on_device: int) -> int:
    """Host memory for experts."""
    if profile.memory.ram == "auto":
        free = hardware.ram - HOST_RESERVE - (0 if hardware.gpu else on_device)
        return int(max(0, free) * HOST_SHARE)
    if profile.memory.ram > hardware.ram:
        raise CapacityError(
            f"memory.ram is {format_size(profile.memory.ram)}; {hardware.name} has {format_size(hardware.ram)}: "
            "lower it or set it to auto"
        )
    if hardware.gpu is None and on_device + profile.memory.ram > hardware.ram:
        raise CapacityError(
            f"memory.ram is {format_size(profile.memory.ram)} beside {format_size(on_device)} for slots and weights; "
            f"{hardware.name} has {format_size(hardware.ram)} for both: lower it or set it to auto"
        )
    return profile.memory.ram


def _ram_experts(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile, on_device: int) -> tuple[int, ...]:
    """Experts per layer in host memory: all, or as many of each layer as the budget holds."""
    budget = _ram_budget(profile, hardware, on_device)
    if sizes.expert_nbytes <= budget:
        return tuple(layer.experts for layer in sizes.layers)
    counts = tuple(_fitting(layer, layer.nbytes * budget // sizes.expert_nbytes) for layer in sizes.layers)
    on_disk = sizes.expert_nbytes - sum(y.of_first(n) for n, y in zip(counts, sizes.layers, strict=True))
    if profile.memory.disk != "auto" and on_disk > profile.memory.disk:
        raise CapacityError(
            f"the experts take {format_size(sizes.expert_nbytes)}; memory.ram leaves {format_size(budget)} for them "
            f"and memory.disk {format_size(profile.memory.disk)}: {format_size(on_disk)} on disk would be needed"
        )
    return counts


def _fitting(layer: LayerSize, room: int) -> int:
    """How many of a layer's experts, from the first on, are no more bytes than `room`."""
    return bisect_right(range(1, layer.experts + 1), room, key=layer.of_first)
