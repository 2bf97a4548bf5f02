"""Changes to a profile by flat names, as the command line and `moeflow.load` take them.

A profile is never changed: the result is a new document, validated like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeflow.errors import UsageError, unknown
from moeflow.schema import Profile

__all__ = ["OVERRIDES", "override"]

OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "hardware": ("hardware",),
    "experts_per_layer": ("cache", "experts_per_layer"),
    "policy": ("cache", "policy"),
    "half_life": ("cache", "half_life"),
    "cache_trace": ("cache", "trace"),
    "predictor": ("prefetch", "predictor"),
    "prefetch_depth": ("prefetch", "depth"),
    "prefetch_experts": ("prefetch", "experts"),
    "vram": ("memory", "vram"),
    "ram": ("memory", "ram"),
    "disk": ("memory", "disk"),
    "context_length": ("context_length",),
    "dtype": ("dtype",),
    "strategy": ("strategy",),
    "execution": ("execution",),
    "cpu_experts": ("cpu", "experts"),
    "cpu_threads": ("cpu", "threads"),
    "cpu_activations": ("cpu", "activations"),
}


def override(profile: Profile, changes: Mapping[str, Any]) -> Profile:
    """The profile with `changes`; those that are None change nothing.

    Raises:
        UsageError: a name is unknown.
        DocumentError: a value breaks the profile's rules.
    """
    data = profile.to_dict()
    for name, value in changes.items():
        if name not in OVERRIDES:
            raise UsageError(unknown("override", name, OVERRIDES))
        if value is None:
            continue
        *parents, key = OVERRIDES[name]
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})  # documents leave out sections that say nothing
        place[key] = value
    return Profile.parse(data, "overrides")
