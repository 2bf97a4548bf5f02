"""Measures decoding in many configurations, and compares the cost model's predictions with what was measured.

    python tools/predictions.py measure sweep.json [SET ...]   # on a CUDA device, about five minutes for all sets
    python tools/predictions.py compare sweep.json --plot predictions.png

Measuring and comparing are apart, so that a change of the cost model is judged by figures that it did not see. Every
set is one model in random weights; routes are forced, as each row says.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moeflow import pipeline
from moeflow.artifact.architectures import architecture
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.bench import Settings, measure_limits, run_rows
from moeflow.probe.environment import environment
from moeflow.schema import Benchmark, BenchmarkRow, HardwareProfile, Profile

RECALL = 0.9


@dataclass(frozen=True)
class Case:
    """One row."""

    k: int
    routing: str = "uniform"
    guesses: bool = True


@dataclass(frozen=True)
class Group:
    """Rows that share blobs."""

    model: str
    bits: int
    cases: tuple[Case, ...]


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
    "deepseek-8": Group("deepseek-v2-lite", 8, (Case(32), Case(48, "markov", guesses=False), Case(64, guesses=False))),
}


def settings_of(group: Group, case: Case) -> Settings:
    scheme = {"backend": "hqq", "bits": group.bits, "group_size": 64}
    quantization = {"experts": scheme, "attention": {"backend": "hqq", "bits": 4, "group_size": 64}}
    profile = Profile.parse({"model": group.model, "quantization": quantization, "context_length": 1024}, "predictions")
    return Settings(
        profile,
        experts_per_layer=case.k,
        routing=case.routing,  # type: ignore[arg-type]
        recall=RECALL if case.guesses else None,
        rows=("full" if case.guesses else "no-prefetch",),
    )


def measured(group: Group, hardware: HardwareProfile) -> list[BenchmarkRow]:
    settings = [settings_of(group, case) for case in group.cases]
    artifact = RandomArtifact(architecture(group.model), settings[0].profile.quantization, group.model)
    return list(run_rows(artifact, hardware, *settings))


def measure(path: Path, chosen: list[str]) -> None:
    hardware, limits = pipeline.resolve_hardware("auto"), measure_limits()
    hardware.save(path.with_suffix(".hardware.yaml"))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    measuring = actions.add_parser("measure")
    measuring.add_argument("path", type=Path)
    measuring.add_argument("sets", nargs="*", choices=[[], *SETS], default=[])
    arguments = parser.parse_args()
    measure(arguments.path, arguments.sets)


if __name__ == "__main__":
    main()
