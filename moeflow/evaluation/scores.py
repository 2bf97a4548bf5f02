"""lm_eval's results as the document's scores: members of a group under it, in lm_eval's order.

Takes the dictionary that `lm_eval.evaluator.evaluate` returns, whose metrics are keys such as `acc,none` and
`acc_stderr,none` among others; imports neither lm_eval nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moeflow.schema import TaskScore

__all__ = ["read_scores"]


def read_scores(found: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """Every metric of every task and group that has any."""
    results = {**found["results"], **found.get("groups", {})}
    return tuple(score for name, depth in _walk(found, results) for score in _scores(found, name, depth, results))


def _walk(found: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Names, each with how many groups it lies in that have scores; a task in two groups comes twice."""
    members: Mapping[str, list[str]] = found.get("group_subtasks", {})
    inside = {name for group in members.values() for name in group}

    def visit(name: str, depth: int) -> Iterator[tuple[str, int]]:
        yield name, depth
        for member in sorted(members.get(name, ())):
            yield from visit(member, depth + _has_scores(results.get(name, {})))

    for name in dict.fromkeys([*members, *results]):
        if name not in inside:
            yield from visit(name, 0)


def _has_scores(result: Mapping[str, Any]) -> bool:
    return any("," in key for key in result)


def _scores(
    found: Mapping[str, Any], name: str, depth: int, results: Mapping[str, Mapping[str, Any]]
) -> Iterator[TaskScore]:
    result = results.get(name, {})
    for key, value in sorted(result.items()):
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        yield TaskScore(
            task=name,
            depth=depth,
            metric=metric,
            filter=chosen,
            value=_number(value),
            stderr=_number(result.get(f"{metric}_stderr,{chosen}")),
            higher_is_better=found.get("higher_is_better", {}).get(name, {}).get(metric),
            samples=result.get("sample_count", {}).get(key, result["sample_len"]),
            shots=_count(found.get("n-shot", {}).get(name)),
            version=None if (version := found.get("versions", {}).get(name)) is None else str(version),
        )


def _number(value: Any) -> float | None:
    """A finite number, or None: lm_eval says `N/A` of what it does not work out."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None
