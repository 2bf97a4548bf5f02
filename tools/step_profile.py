"""Where the time of a decoding step goes: kernels of one captured graph, by name, with the time between them.

Run on a CUDA device: `python tools/step_profile.py --synthetic mixtral-8x7b -k 8`. Steps are replayed under torch's
profiler, which sees the kernels inside a graph. Traced steps run slower than others: shares count, not sums.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from moeflow import pipeline
from moeflow.artifact.architectures import architecture
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.bench import Settings, _plan, _routes
from moeflow.engine import Engine
from moeflow.schema import Profile

STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--synthetic", default="mixtral-8x7b")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("-k", type=int, default=8)
    parser.add_argument("--strategy", default="no-prefetch")
    parser.add_argument("--rows", type=int, default=45)
    given = parser.parse_args()
    scheme = {"backend": "hqq", "bits": given.bits, "group_size": 64}
    quantization = {"experts": scheme, "attention": {"backend": "hqq", "bits": 4, "group_size": 64}}
    wanted = Profile.parse({"model": given.synthetic, "quantization": quantization, "context_length": 1024}, "options")
    artifact = RandomArtifact(architecture(given.synthetic), wanted.quantization, given.synthetic)
    settings = Settings(wanted, experts_per_layer=given.k, routing="uniform")
    plan = _plan(artifact.manifest, pipeline.resolve_hardware("auto"), wanted, given.strategy, given.k)
    begin = time.perf_counter()
    with Engine(artifact, plan, routes=_routes(artifact.manifest, plan, settings)) as engine:
        print(f"built in {time.perf_counter() - begin:.1f} s; {engine.execution}; {engine.fallback or ''}")
        session = engine.session()
        token = int(session.prefill(list(range(1, 65))).argmax())
        for _ in range(40):
            token = int(session.step(token).argmax())
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(40):
            token = int(session.step(token).argmax())
        print(f"{40 / (time.perf_counter() - begin):.1f} tokens/s untraced")
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as traced:
            for _ in range(STEPS):
                token = int(session.step(token).argmax())
            torch.cuda.synchronize()
    report([e for e in traced.events() if e.device_type == torch.autograd.DeviceType.CUDA], given.rows)


def report(events: list, rows: int) -> None:
    spans: dict[str, list[float]] = defaultdict(list)
    for event in events:
        spans[event.name].append(event.time_range.end - event.time_range.start)
    total = sum(map(sum, spans.values()))
    print(f"{'us a step':>10}{'launches':>10}{'us each':>9}  kernel")
    for name, times in sorted(spans.items(), key=lambda item: -sum(item[1]))[:rows]:
        print(f"{sum(times) / STEPS:>10.1f}{len(times) / STEPS:>10.1f}{sum(times) / len(times):>9.2f}  {name[:90]}")
    first, last = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    print(f"{total / STEPS:>10.1f} in kernels of {(last - first) / STEPS:.1f} us a step")
    ordered = sorted(events, key=lambda e: e.time_range.start)
    middle = len(ordered) // 2
    print("a stretch in order: start us, length us")
    origin = ordered[middle].time_range.start
    for e in ordered[middle : middle + 90]:
        length = e.time_range.end - e.time_range.start
        print(f"{e.time_range.start - origin:>10.1f}{length:>8.1f}  {e.name[:70]}")


if __name__ == "__main__":
    main()
