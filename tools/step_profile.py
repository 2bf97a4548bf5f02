"""Where the time of a decoding step goes: kernels of one captured graph, by name, with the time between them.

Run on a CUDA device: `python tools/step_profile.py --synthetic mixtral-8x7b -k 8`. Steps are replayed under torch's
profiler, which sees the kernels inside a graph. Traced steps run slower than others: shares count, not sums. A kernel
that begins while the one before ends is counted from its beginning, its wait included.
"""

from __future__ import annotations

import time

import torch
from torch.profiler import ProfilerActivity, profile
from tracing import arguments, device_events, parts, table

from moeflow.bench import Settings, _routes
from moeflow.engine import Engine

STEPS, WARM_UP, SHOWN = 4, 40, 120


def main() -> None:
    given = arguments(k=8).parse_args()
    artifact, wanted, plan = parts(given)
    settings = Settings(wanted, experts_per_layer=given.k, routing=given.routing, recall=given.recall)
    begin = time.perf_counter()
    with Engine(artifact, plan, routes=_routes(artifact.manifest, plan, settings)) as engine:
        print(f"built in {time.perf_counter() - begin:.1f} s; {engine.execution}; {engine.fallback or ''}")
        session = engine.session()
        token = int(session.prefill(list(range(1, 65))).argmax())
        for turn in range(2):  # the first fills the cache
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(WARM_UP):
                token = int(session.step(token).argmax())
            if turn:
                print(f"{WARM_UP / (time.perf_counter() - begin):.1f} tokens/s untraced")
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as traced:
            for _ in range(STEPS):
                token = int(session.step(token).argmax())
            torch.cuda.synchronize()
    events = device_events(traced)
    table(events, given.rows, STEPS)
    middle = len(events) // 2
    print("a stretch in order: start us, length us")
    for e in events[middle : middle + SHOWN]:
        start = e.time_range.start - events[middle].time_range.start
        print(f"{start:>10.1f}{e.time_range.elapsed_us():>8.1f}  {e.name[:70]}")


if __name__ == "__main__":
    main()
