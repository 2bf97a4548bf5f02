"""`moeflow simulate`: routes replayed through cache policies, as a table, a picture, or JSON."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moeflow.errors import UsageError, unknown

if TYPE_CHECKING:
    from moeflow.offload.trace import Routes
    from moeflow.planning.fitting import Fit
    from moeflow.schema import Guessing, Simulation

__all__ = ["simulate"]

TOKENS = 5000  # of synthetic routes: shares are then good to about half a point in a layer


@dataclass(frozen=True)
class _Source:
    """Routes and whose they are."""

    routes: Routes
    experts: int
    model: str
    routing: Literal["uniform", "markov", "recorded"]


def simulate(
    trace: Annotated[Path | None, typer.Argument(help="Recorded routes; or give --model, or a shape.")] = None,
    model: Annotated[str | None, typer.Option(help="Shape of a known model or of a config.json.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers with experts, of a shape given by hand.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts per layer.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts that a token uses in a layer.")] = None,
    routing: Annotated[
        Literal["uniform", "markov"] | None, typer.Option(help="Of synthetic routes; default: markov.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", min=1, help=f"Default: {TOKENS}, or the whole trace.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of synthetic routes and of guesses.")] = 0,
    skip_prompt: Annotated[
        bool, typer.Option("--skip-prompt", help="Leave out the prompt that a trace begins with.")
    ] = False,
    k: Annotated[
        list[int] | None,
        typer.Option("--experts-per-layer", "-k", min=0, help="Slots per layer, repeatable; default: a range."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Cache policy: lru, lfu, mix or static; repeatable; default: lru.")
    ] = None,
    half_life: Annotated[
        list[float] | None,
        typer.Option(min=1, help="Of mix: uses after which a use is worth half; repeatable; default: the profile's."),
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option(help="Trace that static sets and quotas are taken from; default: the replayed routes themselves."),
    ] = None,
    quotas: Annotated[
        bool, typer.Option("--quotas", help="Share k slots a layer out between layers, to where they hit most, too.")
    ] = False,
    predictor: Annotated[
        Literal["none", "recall", "previous"],
        typer.Option(help="Guess what later layers use: with --recall, or as the token before."),
    ] = "none",
    recall: Annotated[float | None, typer.Option(min=0, max=1, help="Share of guesses that are right.")] = None,
    guesses: Annotated[int | None, typer.Option(min=1, help="Guessed per layer; default: top-k.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers guessed ahead; default: 1.")] = None,
    staging: Annotated[int | None, typer.Option(min=1, help="Landing buffers; default: as a plan has.")] = None,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Also a table of every layer.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Replay routes through cache policies: hit rates for every k beside the optimum, and what guesses bring."""
    from moeflow.console import say
    from moeflow.reporting import curves, picture, simulation

    if plot is not None:
        picture.check(plot)
    source = _source(trace, model, (layers, experts, top_k), routing, tokens, seed, skip_prompt)
    guessing = _guessing(source.routes, predictor, recall, guesses, depth, staging)
    fits = _fits(policy or ["lru"], half_life, source, fit, quotas)
    found = _run(source, k, fits, quotas, guessing, seed, fit)
    typer.echo(simulation.json_line(found) if as_json else simulation.table(found, by_layer), nl=as_json)
    if plot is not None:
        curves.plot(found, plot)
        say(f"wrote {plot}")


def _fits(
    names: Sequence[str], half_lives: list[float] | None, source: _Source, fit: Path | None, quotas: bool
) -> list[Fit]:
    """Each once, in the order given; a mix for every half life."""
    from moeflow.offload.policy import POLICIES
    from moeflow.planning.fitting import Fit
    from moeflow.schema.profile import HALF_LIFE

    for name in names:
        if name == "learned":
            raise UsageError("routes have no hidden states, by which learned decides; train-predictor prints its hits")
        if name not in POLICIES:
            raise UsageError(unknown("cache policy", name, POLICIES))
    if half_lives and "mix" not in names:
        raise UsageError("--half-life is of the policy mix; give --policy mix, too")
    if fit is not None and not quotas and "static" not in names:
        raise UsageError("--fit is of static sets and of quotas; give --policy static or --quotas, too")
    routes = source.routes if fit is None else _fitted_to(fit, source)
    wanted = [(name, uses) for name in names for uses in (half_lives or [HALF_LIFE] if name == "mix" else [HALF_LIFE])]
    return [Fit(routes, source.experts, name, uses) for name, uses in dict.fromkeys(wanted)]


def _fitted_to(fit: Path, source: _Source) -> Routes:
    """Another trace's routes, of the same model's shape."""
    from moeflow.offload.trace import load_trace

    other = load_trace(fit)
    _, layers, top_k = source.routes.shape
    other.require(layers, source.experts, top_k, str(fit))
    return other.routes


def _run(
    source: _Source,
    k: list[int] | None,
    fits: Sequence[Fit],
    quotas: bool,
    guessing: Guessing | None,
    seed: int,
    fit: Path | None,
) -> Simulation:
    from moeflow.console import err
    from moeflow.planning.fitting import shared_out
    from moeflow.planning.simulator import simulate as replay
    from moeflow.planning.simulator import thinned
    from moeflow.schema import SimulatedRow, Simulation

    def report(row: SimulatedRow) -> None:
        status.update(f"{row.label}, k = {row.k}: done")

    ks = sorted(set(k or thinned(source.experts)))
    with err.status("replaying") as status:
        rules = [fit.rule for fit in fits]
        rows, timings = replay(source.routes, source.experts, ks, rules, guessing, seed, report)
        if quotas:
            rows += shared_out(source.routes, source.experts, fits, ks)
    tokens, layers, top_k = source.routes.shape
    return Simulation(
        command=shlex.join(["moeflow", *sys.argv[1:]]),
        model=source.model,
        routing=source.routing,
        seed=seed if guessing or source.routing != "recorded" else None,
        tokens=tokens,
        layers=layers,
        experts=source.experts,
        top_k=top_k,
        guessing=guessing,
        fit=None if fit is None else fit.name,
        rows=tuple(rows),
        timings=tuple(timings),
    )


def _source(
    trace: Path | None,
    model: str | None,
    given: tuple[int | None, int | None, int | None],
    routing: Literal["uniform", "markov"] | None,
    tokens: int | None,
    seed: int,
    skip_prompt: bool,
) -> _Source:
    """Routes of a file, of a model's shape, or of a shape given by hand: exactly one of them."""
    from moeflow.offload.routing import markov, uniform
    from moeflow.planning.shape import Shape, shape_of

    if (trace is not None) + (model is not None) + (given != (None, None, None)) != 1:
        raise UsageError("give a trace, or --model, or a shape by --layers, --experts and --top-k: one of the three")
    if trace is not None:
        if routing is not None:
            raise UsageError(f"--routing is of synthetic routes; those of {trace} are recorded")
        return _recorded(trace, tokens, skip_prompt)
    if skip_prompt:
        raise UsageError("--skip-prompt is of a recorded trace; synthetic routes have no prompt")
    if model is not None:
        shape = shape_of(model)
    else:
        layers, experts, top_k = given
        if layers is None or experts is None or top_k is None:
            raise UsageError("a shape needs --layers, --experts and --top-k, all three")
        shape = Shape("shape given", layers, experts, top_k)
    kind = routing or "markov"
    make = {"uniform": uniform, "markov": markov}[kind]
    routes = make(shape.layers, shape.experts, shape.top_k, tokens or TOKENS, seed)
    return _Source(routes, shape.experts, shape.model, kind)


def _recorded(trace: Path, tokens: int | None, skip_prompt: bool) -> _Source:
    """A trace's first `tokens`, or its first after the prompt."""
    from moeflow.offload.trace import load_trace

    recorded = load_trace(trace)
    if skip_prompt and not recorded.prompt:
        raise UsageError(f"{trace}: does not say where a prompt ends; leave out --skip-prompt")
    routes = recorded.routes[recorded.prompt if skip_prompt else 0 :]
    if not len(routes):
        raise UsageError(f"{trace}: all of its tokens are the prompt's; leave out --skip-prompt, or record an answer")
    if tokens is not None and tokens > len(routes):
        left = " after the prompt" if skip_prompt else ""
        raise UsageError(f"--tokens is {tokens}; {trace} has {len(routes)}{left}")
    return _Source(routes[:tokens], recorded.experts, recorded.model, "recorded")


def _guessing(
    routes: Routes,
    predictor: Literal["none", "recall", "previous"],
    recall: float | None,
    guesses: int | None,
    depth: int | None,
    staging: int | None,
) -> Guessing | None:
    """What is asked of guesses, the rest as the planner sets it."""
    from moeflow.planning.guessing import landing_buffers
    from moeflow.schema import Guessing

    if predictor == "none":
        if (recall, guesses, depth, staging) != (None, None, None, None):
            raise UsageError(
                "--recall, --guesses, --depth and --staging are of guesses; give --predictor recall or previous, too"
            )
        return None
    if (predictor == "recall") != (recall is not None):
        raise UsageError("--predictor recall needs --recall, and no other takes it")
    _, layers, top_k = routes.shape
    ahead = min(depth or 1, max(1, layers - 1))
    count = guesses or top_k
    buffers = staging or landing_buffers(top_k, ahead, count)
    return Guessing(predictor=predictor, recall=recall, experts=count, depth=ahead, staging=buffers)
