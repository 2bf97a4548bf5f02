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
        "cache": _slots(plan),
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
    label = _label(chosen)
    better = found[: found.index(chosen)]
    if chosen.tokens_per_second >= min_speed:
        text = f"{label}: the best quality that reaches {min_speed:g} tokens/s"
    else:
        text = f"{label}: the fastest that fits; none reaches {min_speed:g} tokens/s"
    next_best = next((c for c in reversed(better) if _label(c) != label), None)
    if next_best is None:
        return f"{text}."
    if next_best.plan is None:
        return f"{text}. {_label(next_best)} does not fit: {next_best.refusal}."
    disk = "" if next_best.in_memory else ", with experts on the disk"
    return f"{text}. {_label(next_best)} would give {three_digits(next_best.tokens_per_second)}{disk}."


def _label(candidate: Candidate) -> str:
    quantization = candidate.profile.quantization
    return f"{quantization.experts.label} experts with {quantization.attention.label} attention"


def _slots(plan: Plan) -> str:
    memory, few, most = plan.memory, min(plan.cache_slots), max(plan.cache_slots)
    k = f"{few}" if few == most else f"{few} or {most}"
    fixed = memory.total - memory.slots
    return (
        f"auto is k = {k} experts a layer: {format_size(memory.limit)} of device memory, less {format_size(fixed)} for "
        f"resident weights, KV cache of {plan.context_length} tokens, buffers and workspace, hold "
        f"{format_size(memory.slots)} of them."
    )


def _guesses(chosen: Candidate, plan: Plan) -> str:
    with_, without = chosen.tokens_per_second, chosen.other
    if not plan.prefetch.depth:
        with_, without = without, with_
    verb = "on" if plan.prefetch.depth else "off"
    return (
        f"Guesses are {verb}: {three_digits(with_)} tokens/s with them, {three_digits(without)} without, as predicted."
    )


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
