"""What the profiling tools share: an engine's parts in random weights, and kernels by name from torch's profiler."""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch

from moeflow import pipeline
from moeflow.artifact.architectures import architecture
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.bench import _plan
from moeflow.schema import Plan, Profile


def arguments(k: int) -> argparse.ArgumentParser:
    """Which model, at what bits, with how many cached experts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--synthetic", default="mixtral-8x7b")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("-k", type=int, default=k)
    parser.add_argument("--strategy", default="no-prefetch")
    parser.add_argument("--execution", default="auto")
    parser.add_argument("--routing", default="uniform")
    parser.add_argument("--recall", type=float, default=0.9)
    parser.add_argument("--rows", type=int, default=40)
    return parser


def parts(given: argparse.Namespace) -> tuple[RandomArtifact, Profile, Plan]:
    scheme = {"backend": "hqq", "bits": given.bits, "group_size": 64}
    quantization = {"experts": scheme, "attention": {"backend": "hqq", "bits": 4, "group_size": 64}}
    wanted = {"model": given.synthetic, "quantization": quantization, "context_length": 1024}
    profile = Profile.parse({**wanted, "execution": given.execution}, "options")
    artifact = RandomArtifact(architecture(given.synthetic), profile.quantization, given.synthetic)
    hardware = pipeline.resolve_hardware("auto")
    return artifact, profile, _plan(artifact.manifest, hardware, profile, given.strategy, given.k)


def device_events(trace: Any) -> list[Any]:
    """In the order in which they began."""
    events = (e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sorted(events, key=lambda e: e.time_range.start)


def table(events: list[Any], rows: int, passes: int = 1) -> None:
    """Kernels by their share of the time of one of `passes`."""
    spans: dict[str, list[float]] = defaultdict(list)
    for event in events:
        spans[event.name].append(event.time_range.elapsed_us())
    print(f"{'us a pass':>10}{'launches':>10}{'us each':>9}  kernel")
    for name, times in sorted(spans.items(), key=lambda item: -sum(item[1]))[:rows]:
        print(f"{sum(times) / passes:>10.1f}{len(times) / passes:>10.1f}{sum(times) / len(times):>9.2f}  {name[:90]}")
