"""Where the time of a prefill goes: cold and warm, beside the link's limit; kernels by name; when the link idled.

Run on a CUDA device: `python tools/prefill_profile.py --synthetic mixtral-8x7b -k 4`. Untraced times count; a traced
pass is slower on the host, so its kernels' times and the gaps between copies are to be read, not its length.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile
from tracing import arguments, device_events, parts, table

from moeflow.bench import GIB, Settings, _Run
from moeflow.engine import Engine
from moeflow.probe.bandwidth import link_rate

LAYER_COPY = 1 << 20  # bytes from which on a copy to the device is counted as the stream's


def main() -> None:
    parser = arguments(k=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=4)
    given = parser.parse_args()
    artifact, wanted, plan = parts(given)
    peak = link_rate(GIB).rate
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
    events = device_events(trace)
    print(f"\n{name}, traced: {1e3 * seconds:.1f} ms")
    table(events, rows)
    link(events)


def link(events: list) -> None:
    """Gaps between the stream's copies, and how much of the pass lies before the first and behind the last."""
    copies = [e for e in events if "HtoD" in e.name and e.time_range.elapsed_us() > LAYER_COPY / 60e3]
    if not copies:
        print("nothing was streamed")
        return
    start, end = events[0].time_range.start, max(e.time_range.end for e in events)
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
