"""Measures decoding in many configurations, and compares the cost model's predictions with what was measured.

    python tools/predictions.py measure sweep.json [SET ...]   # on a CUDA device, about five minutes for all sets
    python tools/predictions.py compare docs/measured/*.json --plot docs/images/predictions.png
    python tools/predictions.py search found.json [NAME ...]   # the planner's choice beside its neighbours

Measuring and comparing are apart, so that a change of the cost model is judged by figures that it did not see. Every
set is one model in random weights; routes are forced, as each row says.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from moeflow import pipeline
from moeflow.artifact.architectures import architecture
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.artifact.shapes import config_checkpoint
from moeflow.bench import Settings, measure_limits, run_rows
from moeflow.planning.cost import Running, predict
from moeflow.planning.hits import Habit, hit_rates_of
from moeflow.planning.sizes import ModelSizes
from moeflow.probe.environment import environment
from moeflow.probe.match import find_hardware
from moeflow.schema import Benchmark, BenchmarkRow, HardwareProfile, HqqScheme, Prediction, Profile, Quantization

RECALL = 0.9


@dataclass(frozen=True)
class Case:
    """One row."""

    k: int | None
    """None: the planner's."""
    routing: str = "uniform"
    guesses: bool = True
    host: bool = False
    """Whether the host drives."""
    policy: str = "lru"


@dataclass(frozen=True)
class Group:
    """Rows that share blobs."""

    model: str
    bits: int
    cases: tuple[Case, ...]
    vram: str = "auto"


CHOICES = {
    "mixtral-8x7b in 9 GiB": Group("mixtral-8x7b", 2, (), "9GiB"),
    "qwen3-30b-a3b in 8 GiB": Group("qwen3-30b-a3b", 4, (), "8GiB"),
}
"""Where the planner's choice is measured beside all others of a grid: k, guesses, policy."""
SETS = {
    "mixtral-2": Group(
        "mixtral-8x7b",
        2,
        (Case(2), Case(4), Case(6), Case(4, guesses=False), Case(4, "markov"), Case(8, guesses=False)),
    ),
    "mixtral-3": Group("mixtral-8x7b", 3, (Case(4), Case(3, "markov", guesses=False), Case(8, guesses=False))),
    "mixtral-4": Group("mixtral-8x7b", 4, (Case(2), Case(5, "markov"), Case(4, guesses=False), Case(8, guesses=False))),
    "qwen3-2": Group(
        "qwen3-30b-a3b", 2, (Case(64), Case(64, guesses=False), Case(96, "markov"), Case(128, guesses=False))
    ),
    "qwen3-4": Group(
        "qwen3-30b-a3b",
        4,
        (Case(32, "markov"), Case(64, "markov"), Case(96), Case(64, guesses=False), Case(128, guesses=False)),
    ),
    "deepseek-4": Group(
        "deepseek-v2-lite",
        4,
        (Case(16), Case(32, "markov"), Case(48), Case(32, guesses=False), Case(64, guesses=False)),
    ),
    "mixtral-fresh": Group(
        "mixtral-8x7b", 2, (Case(3), Case(5, guesses=False), Case(7, "markov"), Case(1, "markov", guesses=False))
    ),
    "qwen3-fresh": Group("qwen3-30b-a3b", 4, (Case(16), Case(80, "markov"), Case(112), Case(48, guesses=False))),
    "olmoe-fresh": Group("olmoe-1b-7b", 4, (Case(16), Case(32, "markov"), Case(48, guesses=False), Case(64))),
    "host": Group("mixtral-8x7b", 2, (Case(4, host=True), Case(4, guesses=False, host=True), Case(8, host=True))),
    "deepseek-8": Group("deepseek-v2-lite", 8, (Case(32), Case(48, "markov", guesses=False), Case(64, guesses=False))),
}


def settings_of(group: Group, case: Case) -> Settings:
    scheme = {"backend": "hqq", "bits": group.bits, "group_size": 64}
    quantization = {"experts": scheme, "attention": {"backend": "hqq", "bits": 4, "group_size": 64}}
    profile = Profile.parse(
        {
            "model": group.model,
            "quantization": quantization,
            "cpu": {"experts": "off"},  # the link alone brings what misses
            "context_length": 1024,
            "cache": {"policy": case.policy},
            "memory": {"vram": group.vram},
            **({"execution": "host"} if case.host else {}),
        },
        "predictions",
    )
    return Settings(
        profile,
        experts_per_layer=case.k,
        routing=case.routing,  # type: ignore[arg-type]
        recall=RECALL if case.guesses else None,
        rows=("full" if case.guesses else "no-prefetch",),
        **({"tokens": 8, "warm_up": 4} if case.host else {}),
    )


def measured(group: Group, hardware: HardwareProfile) -> list[BenchmarkRow]:
    settings = [settings_of(group, case) for case in group.cases]
    artifact = RandomArtifact(architecture(group.model), settings[0].profile.quantization, group.model)
    return list(run_rows(artifact, hardware, *settings))


def measure(path: Path, chosen: list[str]) -> None:
    hardware, limits = pipeline.resolve_hardware("auto"), measure_limits()
    rows: list[BenchmarkRow] = []
    for name in chosen or SETS:
        begin = time.perf_counter()
        found = measured(SETS[name], hardware)
        rows += found
        speeds = ", ".join(f"{row.tokens_per_second or 0:.4g}" for row in found)
        print(f"{name}: {speeds} tokens/s ({time.perf_counter() - begin:.0f} s)", flush=True)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        command = " ".join(["python", *sys.argv])
        Benchmark(command=command, date=date, environment=environment(), limits=limits, rows=tuple(rows)).save(path)


def predicted(row: BenchmarkRow, hardware: HardwareProfile, sizes: ModelSizes) -> Prediction:
    """Of a row's configuration; nothing that was measured in the row itself goes in."""
    layers = len(sizes.layers)
    running = Running(
        slots=(row.k,) * layers,
        ram_experts=tuple(layer.experts for layer in sizes.layers),
        strategy=row.strategy,
        execution=row.execution,
        guessed=sizes.top_k if row.strategy == "full" else 0,
    )
    experts = [layer.experts for layer in sizes.layers]
    habit: Habit = "markov" if row.routing == "markov" else "uniform"
    found = predict(sizes, hardware, running, hit_rates_of(experts, running.slots, sizes.top_k, habit), RECALL)
    assert found is not None, "a probed machine has all rates"
    return found


def search(path: Path, names: list[str]) -> None:
    """Measure the planner's choice and its neighbours."""
    hardware, limits = pipeline.resolve_hardware("auto"), measure_limits()
    rows: list[BenchmarkRow] = []
    for name in names or CHOICES:
        group = CHOICES[name]
        (chosen,) = measured(replace(group, cases=(Case(None, "markov"),)), hardware)
        most = int(chosen.k)
        grid = itertools.product((most, most * 3 // 4, most // 2), (True, False), ("lru", "lfu"))
        cases = tuple(Case(k, "markov", guesses, policy=policy) for k, guesses, policy in grid)
        others = measured(replace(group, cases=cases), hardware)
        best = max(row.tokens_per_second or 0.0 for row in (chosen, *others))
        for row, case in zip((chosen, *others), (Case(None), *cases), strict=True):
            what = f"k = {row.k:<6.4g}{'with' if row.strategy == 'full' else 'without'} guesses, {case.policy}"
            print(f"{name}: {what:<36}{row.tokens_per_second:>7.4g} tokens/s")
        print(f"{name}: the planner's choice has {(chosen.tokens_per_second or 0) / best:.3f} of the best", flush=True)
        rows += (chosen, *others)
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    command = " ".join(["python", *sys.argv])
    Benchmark(command=command, date=date, environment=environment(), limits=limits, rows=tuple(rows)).save(path)


Pair = tuple[BenchmarkRow, Prediction]


def pairs_of(run: Benchmark, hardware: HardwareProfile) -> list[Pair]:
    """Every row with its prediction; the link's rate is that of the process that measured."""
    if run.limits.link_peak:
        link = hardware.link.model_copy(update={"host_to_device": round(run.limits.link_peak), "pcie": None})
        hardware = hardware.model_copy(update={"link": link})
    found = []
    for row in run.rows:
        found.append((row, predicted(row, hardware, _sizes(row.model, row.expert_scheme))))
    return found


@cache
def _sizes(model: str, experts: str) -> ModelSizes:
    quantization = Quantization(experts=_scheme(experts), attention=HqqScheme(bits=4, group_size=64))
    return ModelSizes.of_checkpoint(config_checkpoint(architecture(model), model), quantization)


def error(pair: Pair) -> float:
    row, guess = pair
    assert row.tokens_per_second, "every row has a speed"
    return guess.tokens_per_second / row.tokens_per_second - 1


def compare(paths: list[Path], hardware: HardwareProfile, plot: Path | None) -> None:
    runs = [Benchmark.load(path) for path in paths]
    pairs = [pair for run in runs for pair in pairs_of(run, hardware)]
    words = f"{'measured':>9}{'predicted':>10}{'error':>8}"
    print(f"{'model':<18}{'experts':<11}{'driven by':<10}{'k':>5}  {'rows':<13}{'routes':<9}{words}")
    for row, guess in pairs:
        found = f"{row.tokens_per_second:>9.4g}{guess.tokens_per_second:>10.4g}{error((row, guess)):>+8.1%}"
        what = f"{row.execution:<10}{row.k:>5.4g}  {row.strategy:<13}{row.routing:<9}"
        print(f"{row.model:<18}{row.expert_scheme:<11}{what}{found}")
    for execution in dict.fromkeys(row.execution for row, _ in pairs):
        errors = sorted(abs(error(pair)) for pair in pairs if pair[0].execution == execution)
        print(f"{len(errors)} rows that the {execution} drove: ", end="")
        print(f"median error {statistics.median(errors):.1%}, worst {errors[-1]:.1%}")
    if plot:
        draw(pairs, runs[0], plot)


def _scheme(label: str) -> HqqScheme:
    return HqqScheme(bits=int(label[0]), group_size=int(label.split("g")[1].split()[0]))


def draw(pairs: list[Pair], run: Benchmark, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for model, color in zip(
        dict.fromkeys(row.model for row, _ in pairs), ("#1f5f99", "#c8553d", "#588157", "#8a5a9e"), strict=False
    ):
        for strategy, marker in (("full", "o"), ("no-prefetch", "^")):
            shown = [(r, g) for r, g in pairs if r.model == model and r.strategy == strategy]
            label = f"{model}, {'with guesses' if strategy == 'full' else 'without'}"
            across = [row.tokens_per_second for row, _ in shown]
            panel.scatter(
                across, [g.tokens_per_second for _, g in shown], color=color, marker=marker, label=label, s=28
            )
    ends = (2.5, 1500)
    panel.plot(ends, ends, color="#64707d", linewidth=0.8)
    panel.fill_between(ends, [0.8 * e for e in ends], [1.2 * e for e in ends], color="#64707d", alpha=0.12, label="20%")
    panel.set(
        xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, tokens/s", ylabel="predicted, tokens/s"
    )
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Predicted and measured decoding, {run.environment.gpu}, {run.date[:10]}", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    measuring = actions.add_parser("measure")
    measuring.add_argument("path", type=Path)
    measuring.add_argument("sets", nargs="*", choices=[[], *SETS], default=[])
    searching = actions.add_parser("search")
    searching.add_argument("path", type=Path)
    searching.add_argument("names", nargs="*", choices=[[], *CHOICES], metavar="NAME")
    comparing = actions.add_parser("compare")
    comparing.add_argument("paths", type=Path, nargs="+")
    comparing.add_argument("--hardware", default="h100-80gb", help="the machine's name in hardware/, or a path")
    comparing.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "measure":
        measure(arguments.path, arguments.sets)
    elif arguments.action == "search":
        search(arguments.path, arguments.names)
    else:
        compare(arguments.paths, find_hardware(arguments.hardware), arguments.plot)


if __name__ == "__main__":
    main()
