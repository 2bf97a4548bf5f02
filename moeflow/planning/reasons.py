"""A chosen profile as YAML for people: each choice with the reason for it as a comment above.

Reasons are computed from the candidates that were compared, so that they name figures; comments are for reading, and
nothing reads them back.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from moeflow.planning.search import Candidate
from moeflow.schema import HardwareProfile, Plan, Profile
from moeflow.schema.units import format_rate, format_size, three_digits

__all__ = ["annotated", "reasons"]

WIDTH = 100


def reasons(
    chosen: Candidate, found: Sequence[Candidate], hardware: HardwareProfile, min_speed: float
) -> dict[str, str]:
    """Why, by key of the profile; the empty key is for the whole."""
    assert chosen.plan is not None, "what is chosen fits"
    plan = chosen.plan
    return {
        "": _summary(plan, hardware),
        "quantization": _bits(chosen, found, min_speed),
        "cache": _slots(chosen, plan, hardware),
        "prefetch": _guesses(chosen, plan),
        "memory": _tiers(plan),
    }


def _summary(plan: Plan, hardware: HardwareProfile) -> str:
    found = plan.prediction
    link = f"link {format_rate(hardware.link.host_to_device)} ({hardware.source('link.host_to_device').split(',')[0]})"
    if found is None:
        return f"Chosen for {hardware.name}, {link}; its profile lacks a rate that a predicted speed needs."
    assumed = f" Assumed: {'; '.join(found.assumed)}." if found.assumed else ""
    return (
        f"Chosen for {hardware.name}, {link}. Predicted, not measured: {found.speed}, with {found.hit_rate:.0%} of "
        f"expert uses cached.{assumed}"
    )


def _bits(chosen: Candidate, found: Sequence[Candidate], min_speed: float) -> str:
    if not _known(chosen):
        text = f"{chosen.label}: the best quality that fits, since speeds are not known"
    elif chosen.tokens_per_second >= min_speed:
        text = f"{chosen.label}: the best quality that reaches {min_speed:g} tokens/s"
    else:
        text = f"{chosen.label}: the fastest that fits, or as good as; none reaches {min_speed:g} tokens/s"
    better = next((c for c in reversed(found[: found.index(chosen)])), None)
    if better is None:
        return f"{text}."
    if better.plan is None:
        return f"{text}. {better.label} does not fit: {better.refusal}."
    disk = "" if better.in_memory else ", with experts on the disk"
    speed = f"{three_digits(better.tokens_per_second)} tokens/s" if _known(better) else "a speed that is not known"
    return f"{text}. {better.label} would give {speed}{disk}."


def _known(candidate: Candidate) -> bool:
    return candidate.plan is not None and candidate.plan.prediction is not None


def _slots(chosen: Candidate, plan: Plan, hardware: HardwareProfile) -> str:
    memory, few, most = plan.memory, min(plan.cache_slots), max(plan.cache_slots)
    k = f"{few}" if few == most else f"{few} {'or' if most == few + 1 else 'to'} {most}"
    if plan.strategy in ("no-cache", "naive"):
        return f"Nothing is cached: the strategy is {plan.strategy}."
    if chosen.profile.cache.experts_per_layer != "auto":
        return f"k = {k} experts a layer, as asked: {format_size(memory.slots)}."
    if chosen.profile.cache.trace is not None:
        return (
            f"auto is k = {k} experts a layer, where cache.trace says that they hit most: {format_size(memory.slots)}."
        )
    if hardware.gpu is None and plan.cpu is not None and not most:
        return "auto is no slots: the CPU multiplies experts where they lie, and what a slot holds would be a copy."
    fixed = memory.total - memory.slots
    left = f"{format_size(memory.limit)} of device memory, less {format_size(fixed)} for"
    others = f"resident weights, KV cache of {plan.context_length} tokens, buffers and workspace"
    held = f"hold {format_size(memory.slots)} of them"
    if all(k == layer.experts for k, layer in zip(plan.cache_slots, chosen.sizes.layers, strict=True)):
        held = f"hold all of them, {format_size(memory.slots)}"
    elif hardware.gpu is None and few == min(layer.experts for layer in chosen.sizes.layers) // 2:
        return f"auto is k = {k} experts a layer: half of them, since without a GPU slots only stand for one's."
    return f"auto is k = {k} experts a layer: {left} {others}, {held}."


def _guesses(chosen: Candidate, plan: Plan) -> str:
    verb = "on" if plan.prefetch.depth else "off"
    if plan.strategy != "full":
        return f"Guesses are off: the strategy is {plan.strategy}."
    if not _known(chosen):
        return f"Guesses are {verb}; what they gain is not known."
    with_, without = chosen.tokens_per_second, chosen.other
    if not plan.prefetch.depth:
        with_, without = without, with_
    others = f"{three_digits(with_)} tokens/s with them" if with_ else "they do not fit"
    return f"Guesses are {verb}: {others}, {three_digits(without)} without, as predicted."


def _tiers(plan: Plan) -> str:
    if plan.disk_nbytes:
        return (
            f"{format_size(plan.ram_nbytes)} of experts in host memory, {format_size(plan.disk_nbytes)} read from the "
            "disk when they are needed."
        )
    return f"All experts, {format_size(plan.ram_nbytes)}, lie in host memory."


def annotated(profile: Profile, why: Mapping[str, str]) -> str:
    """The profile as YAML, with comments."""
    import yaml

    lines = [_comment(why[""])] if why.get("") else []
    for key, value in profile.to_dict().items():
        if key in why:
            lines.append(_comment(why[key]))
        flow = None if isinstance(value, dict) else False
        lines.append(
            yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=WIDTH)
        )
    return "".join(lines)


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, WIDTH, break_long_words=False))
