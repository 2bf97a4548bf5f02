"""The rows that moeflow's performance targets are about, in one process on one GPU, with what each must reach.

Run on a CUDA device with 24 GiB of free host memory: `python tools/targets.py`, about four minutes; names given as
arguments choose sets of rows. Every set is a model in random weights; a set's rows share its blobs, and misses travel.
The figures are those of `moeflow bench`, which measures one set with any settings. Targets are for one H100 on PCIe 5
x16.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moeflow import pipeline
from moeflow.artifact.architectures import architecture
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.bench import STRATEGIES, Settings, measure_limits, run_rows
from moeflow.probe.environment import environment
from moeflow.reporting import text
from moeflow.schema import Benchmark, BenchmarkRow, HardwareProfile, Profile

UNIFORM = {"routing": "uniform", "recall": 0.9}
STALL = 900_000  # cycles a layer: the link then idles for a third of the time


@dataclass(frozen=True)
class Rows:
    """One model's rows."""

    wants: str
    model: str = "mixtral-8x7b"
    bits: int = 2
    group: int = 64
    metadata: int = 16
    k: int = 4
    settings: dict[str, Any] = field(default_factory=lambda: dict(UNIFORM))


SETS = {
    "uniform": Rows(
        "k = 4: link 0.90 of peak, 27 tokens/s; hits alone: memory 0.50, 300 tokens/s; rows in the paper's order",
        settings={**UNIFORM, "rows": STRATEGIES, "all_hits": True},
    ),
    "kernels": Rows("what kernels reach without the copy engine", settings={**UNIFORM, "copy_engine": False}),
    "stall": Rows(
        "where the link idles a third of the time, guesses gain 1.15",
        settings={**UNIFORM, "rows": STRATEGIES[:2], "stall": STALL},
    ),
    "paper-bits": Rows("22.2 tokens/s, six times the reference's 3.7", group=16, metadata=8),
    "qwen3": Rows(
        "link 0.80 of peak", model="qwen3-30b-a3b", bits=4, k=64, settings={"routing": "markov", "recall": 0.9}
    ),
    "markov": Rows("rows in the paper's order", settings={"routing": "markov", "recall": 0.9, "rows": STRATEGIES[:3]}),
    "model": Rows("rows in the paper's order", settings={"routing": "model", "rows": STRATEGIES[:3]}),
}


def rows_of(rows: Rows, hardware: HardwareProfile) -> list[BenchmarkRow]:
    scheme = {"backend": "hqq", "bits": rows.bits, "group_size": rows.group, "metadata_bits": rows.metadata}
    quantization = {"experts": scheme, "attention": {"backend": "hqq", "bits": 4, "group_size": 64}}
    asked = {"model": rows.model, "quantization": quantization, "context_length": 1024, "cpu": {"experts": "off"}}
    profile = Profile.parse(asked, "targets")
    artifact = RandomArtifact(architecture(rows.model), profile.quantization, rows.model)
    return list(run_rows(artifact, hardware, Settings(profile, experts_per_layer=rows.k, **rows.settings)))


def main() -> None:
    chosen = sys.argv[1:] or list(SETS)
    hardware, limits = pipeline.resolve_hardware("auto"), measure_limits()
    found: list[BenchmarkRow] = []
    for name in chosen:
        begin = time.perf_counter()
        rows = rows_of(SETS[name], hardware)
        found += rows
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        command = f"python tools/targets.py {name}"
        run = Benchmark(command=command, date=date, environment=environment(), limits=limits, rows=tuple(rows))
        print(f"\n## {name}: {SETS[name].wants} ({time.perf_counter() - begin:.0f} s)\n\n{text.table(run)}", flush=True)
        run.save(Path(f"targets-{name}.json"))


if __name__ == "__main__":
    main()
