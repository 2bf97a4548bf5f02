"""The command line: reads arguments, calls the library, shows what comes back.

Nothing heavy is imported before a command needs it, so that help and validation answer at once. Errors are
caught once, in `main`: one message, a documented exit code, a traceback only with `--debug`.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeflow.cli_allocate import allocate
from moeflow.cli_bench import bench
from moeflow.cli_eval import evaluate, evaluate_grid
from moeflow.cli_explain import explain
from moeflow.cli_hardware import hardware as hardware_commands
from moeflow.cli_load import Cpu, Threads, load
from moeflow.cli_pack import pack
from moeflow.cli_plan import autotune, plan
from moeflow.cli_probe import probe
from moeflow.cli_simulate import simulate
from moeflow.cli_trace import trace as trace_command
from moeflow.cli_train import train_predictor
from moeflow.errors import MoeflowError

if TYPE_CHECKING:
    from moeflow.engine import Engine

__all__ = ["app", "main"]

app = typer.Typer(
    name="moeflow",
    help="Run Mixture-of-Experts language models that do not fit the GPU.\n\n"
    "quantize -> pack -> offload-plan -> generate. Start with `moeflow quickstart`.",
    epilog="Exit codes: 0 done, 1 other failure, 2 usage, 3 document, 4 checkpoint, 5 artifact, 6 capacity, 7 storage, "
    "8 device, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(bench)
app.command("eval")(evaluate)
app.command("eval-grid")(evaluate_grid)
app.command()(simulate)
app.command("trace")(trace_command)
app.command("train-predictor")(train_predictor)
app.command()(explain)
app.add_typer(hardware_commands, name="hardware")
_debug = False

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Upper bound on new tokens.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default: the model's own.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="Sample among the k likeliest.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Sample among the likeliest of this joint probability.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Hardware = Annotated[
    str | None, typer.Option(help="Plan anew for this machine: a name in hardware/, a path, or auto (probe).")
]
Strategy = Annotated[
    Literal["full", "no-prefetch", "no-cache", "naive"] | None,
    typer.Option("--ablation", help="Row of the paper's ablation."),
]
Slots = Annotated[int | None, typer.Option("--experts-per-layer", "-k", min=0, help="Cached experts per layer.")]
Policy = Annotated[Literal["lru", "lfu", "mix", "static", "learned"] | None, typer.Option(help="Cache policy.")]
Predictor = Annotated[
    Literal["next-gate", "learned", "none"] | None, typer.Option(help="Who guesses the experts of coming layers.")
]
Artifact = Annotated[Path, typer.Argument(help="Directory that `moeflow pack` wrote.", show_default=False)]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    global _debug
    _debug = debug
    if version:
        from moeflow import __version__

        typer.echo(__version__)
        raise typer.Exit


app.command()(probe)


app.command()(autotune)
app.command()(allocate)
app.command()(pack)
app.command()(plan)


@app.command()
def generate(
    artifact: Artifact,
    prompt: Prompt,
    max_new_tokens: MaxNew = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    ablation: Strategy = None,
    k: Slots = None,
    policy: Policy = None,
    predictor: Predictor = None,
    cpu: Cpu = None,
    threads: Threads = None,
    hardware: Hardware = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write which experts each token uses to this file (.npz): expert ids, no text."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt. Text streams to stdout, statistics follow on stderr."""
    from moeflow.recording import check_writable, recording

    if trace is not None:
        check_writable(trace)
    changes: dict[str, Any] = {"strategy": ablation, "experts_per_layer": k, "policy": policy, "hardware": hardware}
    changes |= {"predictor": predictor, "cpu_experts": cpu, "cpu_threads": threads}
    with (
        load(artifact, record_routes=trace is not None, **changes) as engine,
        recording(engine, trace) if trace is not None else nullcontext(),
    ):
        _answer(
            engine,
            prompt,
            as_json,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )


def _answer(engine: Engine, prompt: str | list[int], as_json: bool, **settings: Any) -> str:
    """Generate, show and return one answer."""
    from moeflow.console import show_stats

    if as_json:
        result = engine.generate(prompt, **settings)
        document = {"prompt": prompt, "text": result.text, "ids": result.ids, "stats": result.stats.to_dict()}
        typer.echo(json.dumps(document))
        return str(result)
    pieces = []
    for piece in engine.stream(prompt, **settings):
        pieces.append(piece)
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
    show_stats(engine.stats)
    return "".join(pieces)


@app.command()
def chat(
    artifact: Artifact,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    ablation: Strategy = None,
    k: Slots = None,
    policy: Policy = None,
    predictor: Predictor = None,
    cpu: Cpu = None,
    threads: Threads = None,
    hardware: Hardware = None,
) -> None:
    """Talk to a packed model; an empty line or Ctrl-D ends. A model without chat template continues the text."""
    from moeflow.console import say

    changes: dict[str, Any] = {"strategy": ablation, "experts_per_layer": k, "policy": policy, "hardware": hardware}
    changes |= {"predictor": predictor, "cpu_experts": cpu, "cpu_threads": threads}
    with load(artifact, **changes) as engine:
        messages: list[dict[str, str]] = []
        session = engine.session()
        say("an empty line ends the conversation")
        while line := _read_line():
            messages.append({"role": "user", "content": line})
            answer = _answer(
                engine,
                engine.conversation(messages, room=max_new_tokens),
                False,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                session=session,
            )
            messages.append({"role": "assistant", "content": answer})


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


@app.command()
def validate(
    document: Annotated[Path, typer.Argument(help="Profile, hardware profile, plan or manifest.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Check a document against its rules, without running anything."""
    from moeflow.schema.kinds import load_any

    found = load_any(document)
    if as_json:
        return typer.echo(json.dumps({"kind": found.kind, "document": found.to_dict()}))
    return typer.echo(f"{document}: valid {found.kind}")


@app.command()
def inspect(artifact: Artifact, as_json: Json = False) -> None:
    """Show what an artifact holds: sizes by role, bits, errors, the layout of a blob."""
    from moeflow.artifact.reader import Artifact as Opened
    from moeflow.console import say, show_manifest
    from moeflow.pipeline import BITS
    from moeflow.schema import BitChoice

    manifest = Opened.open(artifact).manifest
    if as_json:
        return typer.echo(manifest.to_json(), nl=False)
    show_manifest(manifest)
    if (artifact / BITS).is_file():
        chosen = BitChoice.load(artifact / BITS)
        say(f"{BITS}: {chosen.reason}")
    return None


@app.command()
def verify(artifact: Artifact, as_json: Json = False) -> None:
    """Compare every file of an artifact with its checksum."""
    from moeflow.artifact.reader import Artifact as Opened
    from moeflow.console import progress_bar
    from moeflow.errors import ArtifactError

    opened = Opened.open(artifact)
    with progress_bar() as progress:
        faults = list(opened.verify(progress))
    if as_json:
        typer.echo(json.dumps({"artifact": str(artifact), "faults": faults}))
    if faults:
        raise ArtifactError("\n".join(f"{artifact}/{fault}" for fault in faults))
    if not as_json:
        typer.echo(f"{artifact}: all {len(opened.manifest.shards) + len(opened.manifest.files)} files as packed")


@app.command()
def quickstart(
    prompt: Prompt = "In the beginning",
    max_new_tokens: MaxNew = 120,
    seed: Seed = 2,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the artifact.")] = Path(
        "artifacts/quickstart"
    ),
) -> None:
    """Probe, plan, pack and run the demo model that ships with moeflow; no download, no GPU needed."""
    from moeflow import pipeline
    from moeflow.console import progress_bar, say, show_candidates, show_plan
    from moeflow.console_hardware import show_hardware
    from moeflow.schema import Cache, Profile

    if (output / "manifest.json").is_file():
        say(f"using the artifact in {output}")
    else:
        say("measuring this machine")
        machine = pipeline.resolve_hardware("auto")
        show_hardware(machine)
        base = Profile(model="demo", cache=Cache(experts_per_layer=4))  # half of 8, as in the paper's main rows
        chosen, found = pipeline.autotune("demo", machine, base)
        show_candidates(chosen, found)
        say("quantizing and packing")
        shown = chosen.profile.model_copy(update={"prefetch": base.prefetch})  # guesses too, whatever they bring here
        with progress_bar() as progress:
            pipeline.pack(shown, output, hardware=machine, progress=progress)
    say(f"loading {output}")
    engine = load(output)
    show_plan(engine.plan)
    say(f'"{prompt}" goes on:')
    with engine:
        _answer(engine, prompt, False, max_new_tokens=max_new_tokens, seed=seed)
    say(f'again, with your words: moeflow generate {output} -p "..."')


def main() -> None:
    """Run the command line and exit with the error's code; typer itself ends usage errors (2) and Ctrl-C (130)."""
    # Before torch starts OpenMP. By default its threads spin while they wait for each other, and where another program
    # holds a core each small operation waits for that one's time slice: tens of milliseconds instead of microseconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    if len(arguments) < len(sys.argv) - 1:  # wherever it stands: people add it to the end of what has just failed
        arguments.insert(0, "--debug")
    try:
        app(arguments, prog_name="moeflow")
    except MoeflowError as error:
        if _debug:
            raise
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(error.exit_code)
