"""What people see of moeflow in a terminal: progress bars, tables, a line of statistics.

Answers go to stdout, everything else to stderr, so that output can be piped. Knows documents and statistics,
decides nothing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from moeflow.progress import Progress
from moeflow.schema import Manifest, Plan, PlannedCpu, Prediction
from moeflow.schema.layers import written
from moeflow.schema.units import format_size, three_digits

if TYPE_CHECKING:
    from moeflow.generation import Statistics
    from moeflow.planning.forecast import Forecast
    from moeflow.planning.search import Candidate

__all__ = [
    "err",
    "fact_table",
    "grid",
    "out",
    "progress_bar",
    "say",
    "show_candidates",
    "show_forecast",
    "show_manifest",
    "show_plan",
    "show_stats",
]

out = Console()
err = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line about what is going on."""
    err.print(f"[bold cyan]·[/] {escape(message)}")


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with bytes, rate and time left; it vanishes when the work is done."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total)

        yield report


def fact_table(to: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, one a line."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, escape(value))
    to.print(table)


def grid(to: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table with headings."""
    columns = (Column(heading, overflow="fold") for heading in headings)  # never "...": a cell cut short is no answer
    table = Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="cyan")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    to.print(table)


def show_plan(plan: Plan, to: Console = err) -> None:
    """A plan's numbers."""
    memory = plan.memory
    k = (
        f"{min(plan.cache_slots)}"
        if len(set(plan.cache_slots)) == 1
        else f"{min(plan.cache_slots)}-{max(plan.cache_slots)}"
    )
    guess = f"{plan.prefetch.predictor}, {plan.prefetch.experts} experts, {plan.prefetch.depth} ahead"
    rows = [
        ("runs on", f"{plan.device} in {plan.dtype}, planned for {plan.hardware}"),
        ("cache", f"{k} experts per layer, {plan.policy}; {plan.staging_slots} staging slots"),
        ("guesses", guess if plan.prefetch.depth else "off"),
        *([("CPU", _cpu_part(plan, plan.cpu))] if plan.cpu else []),
        (
            "device memory",
            f"{format_size(memory.total)} of {format_size(memory.limit)}: "
            f"resident {format_size(memory.resident)}, KV cache {format_size(memory.kv_cache)} for "
            f"{plan.context_length} tokens, slots {format_size(memory.slots)}, "
            f"buffers {format_size(memory.staging + memory.stream)}",
        ),
        ("experts", f"{format_size(plan.ram_nbytes)} in RAM, {format_size(plan.disk_nbytes)} on disk"),
    ]
    if plan.prediction:
        rows += _prediction_rows(plan.prediction)
    fact_table(to, f"plan ({plan.strategy})", rows)


def _cpu_part(plan: Plan, part: PlannedCpu) -> str:
    threads = f"{part.threads} thread{'s' if part.threads > 1 else ''}"
    if plan.execution == "host":
        exact = "" if part.activations == "fixed16" else f", {part.activations} activations"
        return f"{threads} for products with packed experts{exact}"
    if part.fixed:
        return f"{threads} for all experts"
    return f"{threads} for {part.share:.0%} of missing bytes at first; then as fast as each side proves"


def _prediction_rows(found: Prediction) -> list[tuple[str, str]]:
    computed = f", {format_size(found.computed_bytes)} computed by the CPU" if found.computed_bytes else ""
    moved = (
        f"{found.hit_rate:.0%} hits; {format_size(found.missed_bytes + found.guessed_bytes)} over the link{computed} "
        f"and {format_size(found.read_bytes)} read per token"
    )
    prompt = f"{found.prefill.total:.2g} s to the first token of {found.prefill.tokens} that find nothing cached"
    rows = [("prediction", f"{found.speed}: {moved}"), ("prompt", prompt)]
    return [*rows, ("assumed", "; ".join(found.assumed))] if found.assumed else rows


def show_candidates(chosen: Candidate, found: Sequence[Candidate], to: Console = err) -> None:
    """autotune's choices, best quality first; the taken one is marked."""
    rows = []
    for c in found:
        quantization = c.profile.quantization
        bits = (quantization.experts.label, quantization.attention.label)
        mark = "→" if c is chosen else " "
        if c.plan is None:
            rows.append((mark, *bits, format_size(c.expert_nbytes), "-", "-", c.refusal))
            continue
        few, most = min(c.plan.cache_slots), max(c.plan.cache_slots)
        k = str(few) if few == most else f"{few}-{most}"
        expected = c.plan.prediction
        speed = three_digits(c.tokens_per_second) if expected else "not known"
        between = expected.range if expected else "-"
        disk = f", {format_size(c.plan.disk_nbytes)} of it on disk" if c.plan.disk_nbytes else ""
        rows.append((mark, *bits, format_size(c.expert_nbytes) + disk, k, speed, between))
    grid(to, "choices", ("", "experts", "attention", "size", "k", "tokens/s", "between"), rows)


def show_manifest(manifest: Manifest, to: Console = out) -> None:
    """A packed model: sizes by role, bits, layout."""
    facts = manifest.model
    dense = manifest.resident_nbytes - sum(m.nbytes for m in manifest.resident)
    expert_bits = 8 * manifest.expert_nbytes / facts.expert_parameters  # with scales, zeros and padding
    errors = [layer.relative_error for layer in manifest.layers]
    fact_table(
        to,
        f"{facts.source} ({facts.type})",
        [
            ("parameters", f"{facts.parameters:,}, of which {facts.expert_parameters:,} in experts"),
            ("experts", f"{len(manifest.layers)} layers of {manifest.layers[0].experts}, top-{facts.top_k}"),
            ("quantization", str(manifest.quantization)),
        ],
    )
    grid(
        to,
        "sizes",
        ("role", "bytes", "bits a weight", "relative error"),
        [
            (
                "experts",
                format_size(manifest.expert_nbytes),
                f"{expert_bits:.2f}",
                f"{min(errors):.4f}-{max(errors):.4f}",
            ),
            *_resident_rows(manifest),
            ("other resident", format_size(dense), "", "0"),
        ],
    )
    for number, layout in enumerate(manifest.layouts):
        rows = [
            (m.name, s.part, s.dtype, " x ".join(map(str, s.shape)), str(s.offset), str(s.nbytes))
            for m in layout.matrices
            for s in m.segments
        ]
        whose = f"; {_whose(manifest, number)}" if len(manifest.layouts) > 1 else ""
        title = f"blob {number}: {layout.matrices[0].scheme.label}, {layout.nbytes:,} bytes{whose}"
        grid(to, title, ("matrix", "part", "dtype", "shape", "offset", "bytes"), rows)


def _whose(manifest: Manifest, number: int) -> str:
    """The layers, as the model numbers them, whose blobs have a layout; where not all of a layer's, which."""
    layers: dict[str, list[int]] = {}
    for position, entry in enumerate(manifest.layers):
        experts = [expert for expert in range(entry.experts) if entry.layout_of(expert) == number]
        if experts:
            found = re.search(r"\.(\d+)\.", entry.module)
            some = f"experts {written(experts)} of " if entry.expert_layouts else ""
            layers.setdefault(some, []).append(int(found[1]) if found else position)
    return "; ".join(f"{some}layer{'s' if len(own) > 1 else ''} {written(own)}" for some, own in layers.items())


def _resident_rows(manifest: Manifest) -> Iterator[tuple[str, str, str, str]]:
    """Quantized matrices outside the experts by role; their error is known for all together."""
    roles = dict.fromkeys(("attention", *(m.role for m in manifest.resident)))
    for role in roles:
        matrices = [m for m in manifest.resident if m.role == role]
        nbytes, weights = sum(m.nbytes for m in matrices), sum(m.rows * m.columns for m in matrices)
        bits = f"{8 * nbytes / weights:.2f}" if weights else ""
        yield f"{role.replace('_', ' ')}, packed", format_size(nbytes), bits, f"{manifest.resident_error:.4f}"


def show_forecast(found: Forecast, to: Console = out) -> None:
    """What a pack would make and take."""
    grid(
        to,
        f"{found.model}, shapes from {found.origin}",
        ("role", "stored as", "weights", "bytes", "bits a weight"),
        [(r.role, r.scheme.label, f"{r.weights:,}", format_size(r.nbytes), f"{r.bits:.2f}") for r in found.roles],
    )
    short = "" if found.disk_needed <= found.disk_free else ": not enough, choose another output or fewer bits"
    fact_table(
        to,
        f"packing into {found.output}",
        [
            *([("experts", found.note)] if found.note else []),
            ("disk", f"{format_size(found.disk_needed)} needed, {format_size(found.disk_free)} free{short}"),
            *((w.what, f"{_duration(w.seconds)} at {w.rate}") for w in found.work),
            ("together", f"about {_duration(found.seconds)}: they run beside each other; an estimate from these rates"),
        ],
    )
    if found.plan:
        show_plan(found.plan, to)
    else:
        to.print(f"[red]no plan:[/] {escape(found.refusal)}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def show_stats(stats: Statistics) -> None:
    """One generation's figures."""
    decode = stats.decode
    line = (
        f"{stats.prompt_tokens} tokens in, {stats.new_tokens} out; "
        f"first token after {stats.time_to_first_token:.2f} s, then {stats.tokens_per_second:.1f} tokens/s"
    )
    if decode.uses:
        line += f"; hit rate {decode.hit_rate:.0%}"
    if decode.guesses:
        wrong = decode.guesses - decode.guesses_used
        line += f", guesses {decode.guesses_used} right and {max(0, wrong)} wrong"
    line += f"; {format_size(stats.bytes_per_token)} moved per token"
    if stats.computed_per_token:
        line += f", {format_size(stats.computed_per_token)} computed by the CPU"
    err.print(f"[dim]{line}[/]")
