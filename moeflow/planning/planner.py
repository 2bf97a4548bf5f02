"""The stage offload-plan: profile, model sizes and hardware in, a plan out.

Device memory goes first to what must be there (resident weights, KV cache, landing buffers, workspace), then
to the two layer buffers of prefill, and all that is left to cache slots. Whatever the profile fixes is taken
as it is, or refused with the numbers that would fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeflow.errors import CapacityError, DocumentError
from moeflow.planning.cost import predict
from moeflow.planning.sizes import ITEM_SIZE, ModelSizes
from moeflow.schema import HardwareProfile, MemoryBudget, Plan, PlannedPrefetch, Profile
from moeflow.schema.profile import Dtype, Execution
from moeflow.schema.units import format_size

__all__ = ["make_plan", "PREFILL_CHUNK"]

PREFILL_CHUNK = 512
"""Tokens that go through the model at once in prefill; bounds the workspace."""

LEAST_CAPABILITY = 7.5  # of the kernels
CUDA_RESERVE = 1 << 30  # the driver's context, libraries and fragmentation
HOST_RESERVE = 2 << 30  # the system and Python
HOST_SHARE = 0.9  # of what is left
FEW_TOKENS = 8  # whose experts the kernels multiply in one pass


@dataclass(frozen=True)
class _Fixed:
    """Device memory that does not depend on the number of slots."""

    resident: int
    kv_cache: int
    staging: int
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
    dtype = _dtype(profile, hardware)
    context = min(profile.context_length, sizes.max_context)
    prefetch = _prefetch(profile, sizes)
    staging = sizes.top_k + max(1, prefetch.depth) * max(prefetch.experts, sizes.top_k)
    limit = _device_limit(profile, hardware)
    fixed, stream_layers = _fixed(sizes, dtype, context, staging, limit, profile.strategy == "naive")
    slots = _slots(profile, sizes, hardware, limit - fixed.total)
    slot_bytes = sum(layer.blob_nbytes * k for layer, k in zip(sizes.layers, slots, strict=True))
    if fixed.total + slot_bytes > limit and profile.strategy != "naive":  # slots that were asked for come first
        fixed, stream_layers = replace(fixed, stream=0), 0
    if fixed.total + slot_bytes > limit:
        raise CapacityError(_too_much(profile, sizes, fixed, limit))
    ram_experts = _ram_experts(profile, sizes, hardware, fixed.total + slot_bytes)
    in_ram = sum(layer.blob_nbytes * n for layer, n in zip(sizes.layers, ram_experts, strict=True))
    execution = _execution(profile, sizes, hardware, ram_experts, stream_layers)
    if execution == "device" and hardware.gpu is not None:
        staging, fixed = _land_more(sizes, staging, prefetch, fixed, limit - fixed.total - slot_bytes)
    return Plan(
        manifest_digest=manifest_digest,
        hardware=hardware.name,
        device=hardware.device,
        dtype=dtype,
        execution=execution,
        strategy=profile.strategy,
        policy=profile.cache.policy,
        context_length=context,
        cache_slots=slots,
        staging_slots=staging,
        stream_layers=stream_layers,
        prefetch=prefetch,
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
        prediction=predict(sizes, hardware, slots, ram_experts, profile.strategy),
    )


def _execution(
    profile: Profile, sizes: ModelSizes, hardware: HardwareProfile, ram_experts: tuple[int, ...], stream_layers: int
) -> Execution:
    """The device drives where kernels reach all blobs and prefill has layer buffers; naive offloading has no cache."""
    in_ram = all(n == layer.experts for n, layer in zip(ram_experts, sizes.layers, strict=True))
    possible = in_ram and stream_layers > 0 and profile.strategy != "naive"
    if profile.execution != "auto":
        if profile.execution == "device" and not possible:
            raise DocumentError(
                "execution is device; that needs all experts in host memory, room for two whole layers on the device "
                "and a strategy other than naive: raise memory.ram or memory.vram, or set execution to auto"
            )
        return profile.execution
    able = hardware.gpu is not None and float(hardware.gpu.compute_capability) >= LEAST_CAPABILITY
    return "device" if able and possible else "host"


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
    return PlannedPrefetch(predictor=asked.predictor, depth=depth, experts=experts)


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


def _fixed(
    sizes: ModelSizes, dtype: Dtype, context: int, staging: int, limit: int, must_stream: bool
) -> tuple[_Fixed, int]:
    """The fixed parts, and how many layer buffers prefill gets: 2 unless they would take half of the rest."""
    item = ITEM_SIZE[dtype]
    classes = {layer.blob_nbytes for layer in sizes.layers}
    largest = max(layer.largest_matrix for layer in sizes.layers)
    parts = _Fixed(
        resident=sizes.resident_packed + sizes.resident_dense * item // ITEM_SIZE[sizes.dtype],
        kv_cache=sizes.kv_values_per_token * context * item,
        staging=staging * sum(classes),
        stream=2 * max(layer.experts * layer.blob_nbytes for layer in sizes.layers),
        # one matrix as int32 codes, as float32 and in its final dtype, and a prefill chunk's activations
        workspace=largest * (8 + item) + PREFILL_CHUNK * (64 << 10),
    )
    without = replace(parts, stream=0)
    if must_stream or parts.stream <= (limit - without.total) // 2:
        return parts, 2
    return without, 0


def _land_more(
    sizes: ModelSizes, staging: int, prefetch: PlannedPrefetch, fixed: _Fixed, spare: int
) -> tuple[int, _Fixed]:
    """Memory that no whole k fills, as landing buffers: with enough, short prompts fetch only the experts they need."""
    each = fixed.staging // staging
    wanted = min(FEW_TOKENS * sizes.top_k, max(layer.experts for layer in sizes.layers)) + prefetch.experts
    count = max(staging, min(wanted, staging + spare // each))
    return count, replace(fixed, staging=count * each)


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


def _ram_experts(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile, on_device: int) -> tuple[int, ...]:
    """Experts per layer in host memory: all, or as many of each layer as the budget holds."""
    if profile.memory.ram == "auto":
        free = hardware.ram - HOST_RESERVE - (0 if hardware.gpu else on_device)
        budget = int(max(0, free) * HOST_SHARE)
    elif profile.memory.ram > hardware.ram:
        raise CapacityError(
            f"memory.ram is {format_size(profile.memory.ram)}; {hardware.name} has {format_size(hardware.ram)}: "
            "lower it or set it to auto"
        )
    elif hardware.gpu is None and on_device + profile.memory.ram > hardware.ram:
        raise CapacityError(
            f"memory.ram is {format_size(profile.memory.ram)} beside {format_size(on_device)} for slots and weights; "
            f"{hardware.name} has {format_size(hardware.ram)} for both: lower it or set it to auto"
        )
    else:
        budget = profile.memory.ram
    if sizes.expert_nbytes <= budget:
        return tuple(layer.experts for layer in sizes.layers)
    counts = tuple(int(layer.experts * budget / sizes.expert_nbytes) for layer in sizes.layers)
    on_disk = sizes.expert_nbytes - sum(c * y.blob_nbytes for c, y in zip(counts, sizes.layers, strict=True))
    if profile.memory.disk != "auto" and on_disk > profile.memory.disk:
        raise CapacityError(
            f"the experts take {format_size(sizes.expert_nbytes)}; memory.ram leaves {format_size(budget)} for them "
            f"and memory.disk {format_size(profile.memory.disk)}: {format_size(on_disk)} on disk would be needed"
        )
    return counts
