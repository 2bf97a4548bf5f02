"""A plan taken apart, as people see it: tables of bytes and milliseconds with bars, and what bounds its speed.

All figures are `moeflow.planning.explanation`'s; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from rich.console import Console

from moeflow.console import fact_table, out
from moeflow.console import grid as table
from moeflow.planning.explanation import Change, Explanation, Share
from moeflow.schema import Plan, Prediction
from moeflow.schema.units import format_rate, format_size

__all__ = ["sentence", "show_explanation"]

BAR = 24  # cells of a whole
PARTS = {
    "dense": ("reading resident weights", "the memory's rate"),
    "experts": ("computing with experts", "the memory's rate"),
    "launches": ("launches and small kernels", "the kernels' latency"),
    "misses": ("copies that nothing hides", "the link"),
    "disk": ("reads of missing experts", "the disk"),
    "cpu": ("waiting for the CPU", "the CPU"),
}
SHARED = ("misses, by link and CPU at once", "host memory, which both read,")
ON_CPU = {"experts": ("computing with experts", "the cores"), "launches": ("the host's work", "the host")}


def show_explanation(found: Explanation, to: Console = out) -> None:
    """Where bytes and milliseconds go, and what would help."""
    plan = found.plan
    where = "device memory" if plan.device == "cuda" else "memory that stands for a device's"
    title = f"{where}: {format_size(plan.memory.total)} of {format_size(plan.memory.limit)}"
    _grid(to, title, ("use", "bytes", "share", ""), _rows(found.device, format_size))
    total = format_size(plan.ram_nbytes + plan.disk_nbytes)
    _grid(to, f"experts: {total}", ("place", "bytes", "share", ""), _rows(found.experts, format_size))
    if plan.prediction is None:
        to.print(f"no times: {found.unknown}; `moeflow probe` measures them", highlight=False)
        return
    _show_times(found, plan.prediction, to)
    if found.changes:
        rows = [_change_row(change, plan.memory.limit - plan.memory.total) for change in found.changes]
        _grid(to, "what would help", ("change", "tokens/s", "gain", "takes"), rows)
    to.print(sentence(found), highlight=False, markup=False)


def sentence(found: Explanation) -> str:
    """What bounds the speed and what would help most; only of plans with a prediction."""
    what, by = _part(found.plan, found.bound)
    said = f"{found.largest.share:.0%} of a token is {what}: {by} bounds the speed"
    if found.unknown:
        return f"{said}. What would help is not said: {found.unknown}."
    if not found.changes:
        return f"{said}, and none of the changes tried makes it faster."
    best = found.changes[0]
    return f"{said}; most would help {best.what}, for {best.tokens_per_second:.3g} tokens/s ({_gain(best)})."


def _show_times(found: Explanation, predicted: Prediction, to: Console) -> None:
    total = predicted.decode.total
    title = f"a token: {_milliseconds(total)} ms, {predicted.tokens_per_second:.3g} tokens/s"
    named = [Share(_part(found.plan, part.name)[0], part.value, part.share) for part in found.token]
    _grid(to, title, ("part", "ms", "share", ""), _rows(named, _milliseconds))
    wasted = f", of which {format_size(predicted.wasted_bytes)} for nothing" if predicted.guessed_bytes else ""
    guessed = f", {format_size(predicted.guessed_bytes)} guessed{wasted}" if predicted.guessed_bytes else ""
    rows = [
        ("between", f"{predicted.low:.3g} and {predicted.high:.3g} tokens/s"),
        ("hits", f"{predicted.hit_rate:.0%}"),
        ("over the link", f"{format_size(predicted.missed_bytes)} missed{_at(found, 'link_rate')}{guessed}"),
        *_computed(found),
        ("hidden", f"{_milliseconds(predicted.hidden)} ms of copies, while it computes"),
        ("read", f"{format_size(predicted.read_bytes)} from device memory"),
        *((("assumed", "; ".join(predicted.assumed)),) if predicted.assumed else ()),
    ]
    fact_table(to, "", rows)
    to.print()
    prefill = predicted.prefill
    title = f"a prompt of {prefill.tokens} tokens: {_milliseconds(prefill.total)} ms"
    _grid(to, title, ("part", "ms", "of longest", ""), _rows(found.prompt, _milliseconds))


def _computed(found: Explanation) -> Iterator[tuple[str, str]]:
    """What the CPU multiplies where it lies."""
    if found.split and found.plan.cpu:
        threads = f"{found.plan.cpu.threads} thread{'s' if found.plan.cpu.threads > 1 else ''}"
        both = ", while both read host memory" if found.split.link_rate else ""
        yield "by the CPU", f"{format_size(found.split.cpu_nbytes)}{_at(found, 'cpu_rate')} with {threads}{both}"


def _at(found: Explanation, which: Literal["link_rate", "cpu_rate"]) -> str:
    rate = getattr(found.split, which) if found.split else None
    return f" at {format_rate(rate)}" if rate else ""


def _grid(to: Console, title: str, headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table(to, title, headings, rows)
    to.print()


def _rows(parts: Iterable[Share], text: Callable[[float], str]) -> Iterator[tuple[str, str, str, str]]:
    for part in parts:
        if part.value:
            bar = "█" * round(BAR * part.share) or "▏"
            yield part.name, f"{text(part.value):>9}", f"{part.share:>6.1%}", bar


def _change_row(change: Change, free: int) -> tuple[str, str, str, str]:
    takes = [
        f"{format_size(nbytes)} more of {where}"
        for nbytes, where in ((change.device_nbytes, "device memory"), (change.ram_nbytes, "host memory"))
        if nbytes
    ]
    if 0 < change.device_nbytes <= free:
        takes.append("which is free")
    return change.what, f"{change.tokens_per_second:>8.4g}", f"{_gain(change):>5}", ", ".join(takes)


def _gain(change: Change) -> str:
    return f"{change.gain:+.0%}" if change.gain < 1 else f"{1 + change.gain:.3g}x"


def _part(plan: Plan, name: str) -> tuple[str, str]:
    """What it is, and what bounds it."""
    if plan.cpu and plan.execution == "device" and name == "misses":
        return SHARED
    if plan.execution == "host" and name == "launches":
        return ON_CPU[name]
    return ON_CPU.get(name, PARTS[name]) if plan.device == "cpu" else PARTS[name]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.9995 else f"{1e3 * seconds:.3g}"
