"""Where the time of a prefill goes: cold and warm, beside the link's limit; kernels by name; when the link idled.

Run on a CUDA device: `python tools/prefill_profile.py --synthetic mixtral-8x7b -k 4`. Untraced times count; a traced
pass is slower on the host, so its kernels' times and the gaps between copies are to be read, not its length.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile

from moeflow import pipeline
from moeflow.artifact.architectures import architecture
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.bench import GIB, Settings, _plan, _Run
from moeflow.engine import Engine
from moeflow.probe.bandwidth import link_rate
from moeflow.schema import Profile

LAYER_COPY = 1 << 20  # bytes from which on a copy to the device is counted as the stream's


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--synthetic", default="mixtral-8x7b")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--strategy", default="no-prefetch")
    parser.add_argument("--execution", default="auto")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--rows", type=int, default=30)
    given = parser.parse_args()
    scheme = {"backend": "hqq", "bits": given.bits, "group_size": 64}
    wanted = Profile.parse(
        {"model": given.synthetic, "context_length": 1024, "execution": given.execution,
         "quantization": {"experts": scheme, "attention": {"backend": "hqq", "bits": 4, "group_size": 64}}}, "options",
    )  # fmt: skip
    artifact = RandomArtifact(architecture(given.synthetic), wanted.quantization, given.synthetic)
    plan = _plan(artifact.manifest, pipeline.resolve_hardware("auto"), wanted, given.strategy, given.k)
    peak = link_rate(GIB)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with Engine(artifact, plan) as engine:
        print(f"{engine.execution} {engine.fallback or ''}; copy engine {peak / 1e9:.1f} GB/s")
        run = _Run(engine, Settings(wanted, prompt=given.prompt))
        run.prefill()
        print(f"{'':<8}{'ms':>8}{'MB moved':>10}{'ms at peak':>12}{'ratio':>8}")
        for name in ["cold"] * given.repeats + ["warm"] * given.repeats:
            measure(engine, run, name, peak)
        used, memory = torch.cuda.max_memory_reserved(), plan.memory
        print(f"device memory: {used / GIB:.3f} GiB of {memory.total / GIB:.3f} planned, {used / memory.total:.3f}")
        print(f"  allocated at most {torch.cuda.max_memory_allocated() / GIB:.3f} GiB; {memory}")
        for name in ("cold", "warm"):
            traced(engine, run, name, given.rows)


def measure(engine: Engine, run: _Run, name: str, peak: float) -> None:
    if name == "cold":
        engine.empty_cache()
    seconds, traffic = run.prefill()
    least = traffic.moved_bytes / peak
    ratio = f"{seconds / least:.3f}" if least else "-"
    print(f"{name:<8}{1e3 * seconds:>8.1f}{traffic.moved_bytes / 1e6:>10.0f}{1e3 * least:>12.1f}{ratio:>8}")


def traced(engine: Engine, run: _Run, name: str, rows: int) -> None:
    if name == "cold":
        engine.empty_cache()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        begin = time.perf_counter()
        run.prefill()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    print(f"\n{name}, traced: {1e3 * seconds:.1f} ms")
    table(events, rows)
    link(events)


def table(events: list, rows: int) -> None:
    spans: dict[str, list[float]] = defaultdict(list)
    for event in events:
        spans[event.name].append(event.time_range.elapsed_us())
    print(f"{'ms':>9}{'launches':>10}{'us each':>9}  kernel")
    for name, times in sorted(spans.items(), key=lambda item: -sum(item[1]))[:rows]:
        print(f"{sum(times) / 1e3:>9.2f}{len(times):>10}{sum(times) / len(times):>9.1f}  {name[:90]}")


def link(events: list) -> None:
    """Gaps between the stream's copies, and how much of the pass lies before the first and behind the last."""
    ordered = sorted(events, key=lambda e: e.time_range.start)
    copies = [e for e in ordered if "HtoD" in e.name and e.time_range.elapsed_us() > LAYER_COPY / 60e3]
    if not copies:
        print("nothing was streamed")
        return
    start, end = ordered[0].time_range.start, max(e.time_range.end for e in events)
    first, last = copies[0].time_range.start, copies[-1].time_range.end
    busy = sum(e.time_range.elapsed_us() for e in copies)
    gaps = [b.time_range.start - a.time_range.end for a, b in pairwise(copies)]
    kernels = sum(e.time_range.elapsed_us() for e in events if "Memcpy HtoD" not in e.name)
    print(f"link: {len(copies)} copies, busy {busy / 1e3:.1f} ms of {(end - start) / 1e3:.1f} ms on the device")
    print(f"  before the first {(first - start) / 1e3:.2f} ms, behind the last {(end - last) / 1e3:.2f} ms")
    print(f"  idle between copies {sum(gaps) / 1e3:.2f} ms; longest gaps {[round(g) for g in sorted(gaps)[-8:]]} us")
    print(f"kernels and copies on the device: {kernels / 1e3:.1f} ms")


if __name__ == "__main__":
    main()
