"""`moeflow bench`: rows of a benchmark as a table, a plot and one line of JSON."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeflow.errors import UsageError, unknown

if TYPE_CHECKING:
    from moeflow.artifact.reader import Artifact
    from moeflow.bench import Settings
    from moeflow.schema import Benchmark, HardwareProfile, Profile
    from moeflow.schema.benchmark import Compared
    from moeflow.schema.profile import Execution

__all__ = ["bench"]

Bits = Annotated[int, typer.Option(help="Bits of the experts' weights: 2, 3, 4 or 8; 16 keeps them as they are.")]

Compare = Annotated[
    str | None,
    typer.Option(
        help="Rows that differ in who takes experts that the device lacks: any of cpu (computes all of them, none is "
        "cached), link and both, with commas between."
    ),
]
Routes = Annotated[
    Literal["model", "uniform", "markov", "recorded"] | None,
    typer.Option(help="Where routes come from; default: uniform for --synthetic, else the model's router."),
]


def bench(
    artifact: Annotated[Path | None, typer.Argument(help="Directory that `moeflow pack` wrote.")] = None,
    synthetic: Annotated[
        str | None, typer.Option(help="Random weights in the shapes of a known model or of a config.json.")
    ] = None,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="The paper's four rows, and one of hits alone.")
    ] = False,
    compare: Compare = None,
    experts_per_layer: Annotated[
        int | None, typer.Option("--experts-per-layer", "-k", min=0, help="Cached experts per layer.")
    ] = None,
    bits: Bits = 2,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    metadata_bits: Annotated[int, typer.Option(help="Bits of each scale and zero: 16 or 8.")] = 16,
    attention_bits: Annotated[int, typer.Option(help="Bits of the attention's weights; 16 keeps them.")] = 4,
    routing: Routes = None,
    recall: Annotated[float | None, typer.Option(min=0, max=1, help="Of forced guesses.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Routes for --routing recorded.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to decode.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    context_length: Annotated[int, typer.Option(min=2, help="Positions of the KV cache.")] = 1024,
    stall: Annotated[int, typer.Option(min=0, help="GPU cycles to idle in every layer, to stretch computing.")] = 0,
    execution: Annotated[
        Literal["device", "host"] | None, typer.Option(help="Who drives a step; default: the planner's choice.")
    ] = None,
    hardware: Annotated[str, typer.Option(help="A name in hardware/, a path, or auto (probe).")] = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG); --ablations writes bench.png.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Append a section in Markdown.")] = None,
) -> None:
    """Measure decoding and prefill beside the machine's limits. Table, plot, and one line of JSON last."""
    from moeflow import pipeline
    from moeflow.bench import Settings
    from moeflow.schema.quantization import scheme_settings

    schemes = {
        "experts": scheme_settings(bits, group_size, metadata_bits),
        "attention": scheme_settings(attention_bits),
    }
    source, profile = _source(artifact, synthetic, schemes)
    settings = Settings(
        profile=_as_asked(profile, context_length, execution, ablations),
        experts_per_layer=experts_per_layer,
        routing=routing or ("uniform" if synthetic else "model"),
        recall=recall,
        trace=trace,
        tokens=tokens,
        prompt=min(prompt, context_length - 5 * 16 - tokens),
        stall=stall,
        rows=("full", "no-prefetch", "no-cache", "naive") if ablations else ("full",),
        compare=_compared(compare, ablations),
        all_hits=ablations,
    )
    if settings.prompt < 1:
        raise UsageError(f"{tokens} tokens do not fit --context-length {context_length} beside a prompt and warm-up")
    run = _run(source, pipeline.resolve_hardware(hardware), settings)
    _show(run, output, markdown, plot or (Path("bench.png") if ablations else None))


def _run(source: Artifact, machine: HardwareProfile, settings: Settings) -> Benchmark:
    from moeflow.bench import measure_limits, run_rows
    from moeflow.console import progress_bar, say
    from moeflow.probe.environment import environment
    from moeflow.reporting.cells import EXPERTS_ON
    from moeflow.schema import Benchmark

    with progress_bar() as progress:
        limits = measure_limits(progress)
        rows = []
        for row in run_rows(source, machine, settings, progress=progress):
            rows.append(row)
            by = f", misses by {EXPERTS_ON[row.experts_on]}" if row.experts_on else ""
            say(f"{row.strategy}, k = {row.k:g}{by}: {row.tokens_per_second or 0:.1f} tokens/s")
    return Benchmark(
        command=shlex.join(["moeflow", *sys.argv[1:]]),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        environment=environment(),
        limits=limits,
        rows=tuple(rows),
    )


def _show(run: Benchmark, output: Path | None, markdown: Path | None, picture: Path | None) -> None:
    from moeflow.console import say
    from moeflow.reporting import text

    typer.echo(text.table(run))
    if picture is not None:
        from moeflow.reporting.plot import plot

        plot(run, picture)
        say(f"wrote {picture}")
    if markdown is not None:
        with markdown.open("a", encoding="utf-8") as stream:
            stream.write("\n" + text.markdown(run))
    if output is not None:
        run.save(output)
    typer.echo(text.json_line(run))


def _as_asked(profile: Profile, context: int, execution: Execution | None, ablations: bool) -> Profile:
    """The CPU takes no part in ablations, whose rows the paper's switches alone tell apart."""
    update: dict[str, Any] = {"context_length": context, "execution": execution or "auto"}
    if ablations:
        update["cpu"] = profile.cpu.model_copy(update={"experts": "off"})
    return profile.model_copy(update=update)


def _compared(text: str | None, ablations: bool) -> list[Compared]:
    """The rows that `--compare` names, each once."""
    from moeflow.bench import COMPARED

    names = [name.strip() for name in text.split(",")] if text is not None else []
    for name in names:
        if name not in COMPARED:
            raise UsageError(f"--compare {text}: {unknown('row', name, COMPARED)}")
    if names and ablations:
        raise UsageError("--compare and --ablations are two tables; ask for one")
    return [name for name in COMPARED if name in names]


def _source(artifact: Path | None, synthetic: str | None, quantization: dict[str, Any]) -> tuple[Artifact, Profile]:
    """What to run, and the profile to plan it by."""
    from moeflow.schema import Profile

    if (artifact is None) == (synthetic is None):
        raise UsageError("give an artifact, or --synthetic with the name of a model or a config.json")
    if synthetic is not None:
        from moeflow.artifact.architectures import architecture
        from moeflow.artifact.random_weights import RandomArtifact

        profile = Profile.parse({"model": synthetic, "quantization": quantization}, "options")
        return RandomArtifact(architecture(synthetic), profile.quantization, synthetic), profile
    from moeflow.artifact.reader import Artifact

    assert artifact is not None
    opened = Artifact.open(artifact)
    return opened, Profile.parse({"model": opened.manifest.model.source}, "options")
