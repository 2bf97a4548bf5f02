"""Where a plan's bytes and milliseconds go, what bounds its speed, and what would help: figures, for people to read.

It repeats the cost model with one thing changed at a time, which takes the model's sizes and the machine; where they
are not at hand, or the model would now predict something else than the plan says, the largest part is named and no
more. It changes no plan and knows no text but the names of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moeflow.planning.cost import Running, predict
from moeflow.planning.sizes import ModelSizes
from moeflow.planning.split import Split, faster_cpu, faster_joint_link, other_splits, split_of
from moeflow.schema import HardwareProfile, Plan, Prediction

__all__ = ["Change", "Explanation", "Share", "explain", "running_of"]

SAME = 0.005  # predictions that are no further apart are the same


@dataclass(frozen=True)
class Share:
    """A part of something."""

    name: str
    value: float
    """Bytes or seconds."""
    share: float
    """Of the whole; of the longest where parts overlap."""


@dataclass(frozen=True)
class Change:
    """One thing that might be otherwise."""

    what: str
    tokens_per_second: float
    gain: float
    """0.5 where a token takes two thirds of the time."""
    device_nbytes: int = 0
    """More of device memory."""
    ram_nbytes: int = 0
    """More of host memory."""


@dataclass(frozen=True)
class Explanation:
    """A plan taken apart."""

    plan: Plan
    device: tuple[Share, ...]
    """Bytes of device memory by use, up to the limit."""
    experts: tuple[Share, ...]
    """Bytes of experts in host memory and on the disk."""
    token: tuple[Share, ...]
    """Seconds of a token by part; empty where nothing is predicted, as the two below."""
    prompt: tuple[Share, ...]
    """Seconds of a prompt's parts, which overlap."""
    bound: str
    """The token's largest part."""
    split: Split | None
    """Of what misses; None where the CPU takes nothing of it."""
    changes: tuple[Change, ...]
    """What would help, most first; nothing that gains less than half a percent."""
    unknown: str
    """Why it is not known what would help; empty where it is."""

    @property
    def largest(self) -> Share:
        """Of the token's parts; only where there are some."""
        return max(self.token, key=lambda part: part.value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(replace(self, plan=None)), "plan": self.plan.to_dict()}  # type: ignore[arg-type]


def explain(plan: Plan, sizes: ModelSizes | None = None, hardware: HardwareProfile | None = None) -> Explanation:
    """Take a plan apart.

    Args:
        plan: with or without a prediction.
        sizes: of its model, to say what would help.
        hardware: its machine, for the same.
    """
    memory, found = plan.memory, plan.prediction
    device = {
        "resident weights": memory.resident,
        "KV cache": memory.kv_cache,
        "cached experts": memory.slots,
        "landing buffers": memory.staging,
        "layer buffers": memory.stream,
        "workspace": memory.workspace,
        "free": memory.limit - memory.total,
    }
    token: dict[str, float] = {}
    prompt: dict[str, float] = {}
    if found:
        token = {name: getattr(found.decode, name) for name in ("dense", "experts", "launches", "misses", "disk")}
        token |= {"cpu": found.decode.cpu} if found.decode.cpu else {}
        prompt = {name: getattr(found.prefill, name) for name in ("link", "compute", "disk")}
    changes, unknown = _helpful(plan, sizes, hardware)
    return Explanation(
        plan=plan,
        device=_shares(device, memory.limit),
        experts=_shares({"host memory": plan.ram_nbytes, "disk": plan.disk_nbytes}, plan.ram_nbytes + plan.disk_nbytes),
        token=_shares(token, sum(token.values())),
        prompt=_shares(prompt, max(prompt.values(), default=0.0)),
        bound=max(token, key=token.__getitem__) if token else "",
        split=split_of(plan, running_of(plan), sizes, hardware),
        changes=changes,
        unknown=unknown,
    )


def running_of(plan: Plan) -> Running:
    """What of a plan its speed depends on."""
    guessed = plan.prefetch.experts if plan.prefetch.depth else 0
    return Running(plan.cache_slots, plan.ram_experts, plan.strategy, plan.execution, guessed, plan.cpu)


def _shares(parts: dict[str, Any], whole: float) -> tuple[Share, ...]:
    return tuple(Share(name, value, value / whole if whole else 0.0) for name, value in parts.items())


def _helpful(plan: Plan, sizes: ModelSizes | None, hardware: HardwareProfile | None) -> tuple[tuple[Change, ...], str]:
    if plan.prediction is None:
        return (), "the plan predicts nothing: its hardware profile lacks a rate"
    if sizes is None or hardware is None:
        return (), "the model's sizes or the machine are not at hand"
    now = predict(sizes, hardware, running_of(plan))
    if now is None or abs(now.tokens_per_second / plan.prediction.tokens_per_second - 1) > SAME:
        said = f"{now.tokens_per_second:.4g}" if now else "no"
        return (), f"the cost model now predicts {said} tokens/s for it: plan it anew"
    found = [
        Change(what, then.tokens_per_second, then.tokens_per_second / now.tokens_per_second - 1, *needs)
        for what, then, *needs in _changed(plan, sizes, hardware)
        if then is not None
    ]
    return tuple(sorted((c for c in found if c.gain > SAME), key=lambda c: -c.gain)), ""


def _changed(
    plan: Plan, sizes: ModelSizes, hardware: HardwareProfile
) -> Iterator[tuple[str, Prediction | None, int, int]]:
    """Each change, what is predicted with it, and what it takes of device and host memory."""
    running = running_of(plan)
    has = [layer.experts for layer in sizes.layers]
    more = [min(k + 1, n) for k, n in zip(running.slots, has, strict=True)]
    if plan.strategy in ("full", "no-prefetch"):
        added = zip(more, running.slots, sizes.layers, strict=True)
        needed = sum((n - k) * layer.blob_nbytes for n, k, layer in added)
        yield "one more expert cached in each layer", predict(sizes, hardware, replace(running, slots=more)), needed, 0
    yield from _elsewhere(plan, sizes, hardware, running, has)
    for what, then in other_splits(plan, sizes, hardware, running):
        yield what, then, 0, 0
    yield "twice the link's rate", predict(sizes, _faster_link(hardware), running), 0, 0
    yield "twice the device memory's rate", predict(sizes, _faster_memory(hardware), running), 0, 0
    if plan.device == "cuda" and plan.cpu:
        yield "twice the host memory's rate", predict(sizes, faster_cpu(hardware), running), 0, 0
    if hardware.disk and plan.disk_nbytes:
        disk = hardware.disk.model_copy(update={"read": 2 * hardware.disk.read})
        yield "twice the disk's rate", predict(sizes, hardware.model_copy(update={"disk": disk}), running), 0, 0


def _elsewhere(
    plan: Plan, sizes: ModelSizes, hardware: HardwareProfile, running: Running, has: Sequence[int]
) -> Iterator[tuple[str, Prediction | None, int, int]]:
    """Experts that leave the disk, and the host that leaves driving to the device, which needs that."""
    missing = plan.disk_nbytes
    if missing:
        yield "every expert in host memory", predict(sizes, hardware, replace(running, ram_experts=has)), 0, missing
    if plan.device == "cuda" and plan.execution == "host" and plan.strategy != "naive":
        driven = replace(running, ram_experts=has, execution="device")
        what = "every expert in host memory, and the device driving" if missing else "the device driving"
        yield what, predict(sizes, hardware, driven), 0, missing


def _faster_link(hardware: HardwareProfile) -> HardwareProfile:
    link = hardware.link
    points = tuple(
        point.model_copy(update={"engine": 2 * point.engine, "kernel": point.kernel and 2 * point.kernel})
        for point in link.by_size
    )
    faster = link.model_copy(update={"host_to_device": 2 * link.host_to_device, "by_size": points})
    return faster_joint_link(hardware).model_copy(update={"link": faster})


def _faster_memory(hardware: HardwareProfile) -> HardwareProfile:
    """Of the GPU with the products' measured rates, which are bound by it; else of the host."""
    gpu = hardware.gpu
    if gpu is None:
        return faster_cpu(hardware)
    update: dict[str, Any] = {"memory_bandwidth": gpu.memory_bandwidth and 2 * gpu.memory_bandwidth}
    if gpu.kernels:
        products = {n: p.model_copy(update={"rate": 2 * p.rate}) for n, p in gpu.kernels.products.items()}
        update["kernels"] = gpu.kernels.model_copy(update={"products": products})
    return hardware.model_copy(update={"gpu": gpu.model_copy(update=update)})
