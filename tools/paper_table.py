"""Writes docs/predictions.md: what the planner predicts for the paper's machines, beside what the paper measured there.

    python tools/paper_table.py                      # to the terminal
    python tools/paper_table.py docs/predictions.md

Nothing runs: shapes are of the published config, machines are the files in hardware/, speeds are the cost model's. A
test compares the page with what this prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from moeflow.artifact.architectures import architecture
from moeflow.artifact.shapes import config_checkpoint
from moeflow.errors import MoeflowError
from moeflow.files import write_text
from moeflow.planning.cost import RECALL
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.probe.match import find_hardware
from moeflow.reporting.paper import MEASURED, ROWS, K
from moeflow.schema import Cache, HardwareProfile, HqqScheme, Plan, Profile, Quantization
from moeflow.schema.profile import Strategy
from moeflow.schema.units import format_rate, format_size, three_digits

MODEL = "mixtral-8x7b"
EXPERTS = {2: HqqScheme(bits=2, group_size=16, metadata_bits=8), 3: HqqScheme(bits=3, group_size=64)}
NAMES = {"a100-80gb": "A100 80 GB", "rtx-3080-mobile": "3080 Mobile", "rtx-3060": "3060", "t4": "T4 (Colab)"}
MORE_RAM = 32 << 30  # of a T4's machine whose host memory holds all experts
CACHED: tuple[Strategy, ...] = ("full", "no-prefetch")

HEAD = """# Predictions for the paper's machines

Made by `python tools/paper_table.py docs/predictions.md`. **PREDICTED, not measured**: moeflow was not run on any of
these machines. What the cost model says of them stands beside table 2 of the paper (arXiv 2312.17238), whose authors
measured their own code there, so a row compares two programs, one of which is a model of itself. What was measured of
moeflow stands in [benchmarks.md](benchmarks.md).

Tokens/s of Mixtral-8x7B, batch 1, attention at 4 bits (group 64), a context of {context} tokens; in brackets the
range: below with routes that never repeat and guesses of which half are right, on both sides the margin of unmeasured
rates.
"""

TAIL = """## Assumptions

- Rates are those of data sheets and typical figures in `hardware/*.yaml`. Links: {links}. A laptop that wires 8 lanes
  has half of its link, and half of the speed where the link is the limit. The paper's naive row on the 3060 moves
  17.0 GB a token at 0.919 tokens/s: 15.6 GB/s, close to the peak of PCIe 3.0 x16, where 12 are assumed here.
- Kernels are taken to be as on the H100 on which they were measured: the same share of the device memory's rate and
  the same latency of a launch. No kernel of moeflow was run on these GPUs.
- Of guesses, {recall:.0%} are taken to be right. Routes are taken to repeat as the Mixtral report says that the
  model's do; the table has the hit rate that this gives.
- "2 bits" are the paper's: group 16 with 8-bit metadata, 3 bits a weight as stored. "3 bits" are group 64 with 16-bit
  metadata, the nearest that moeflow has to the paper's group 64 with scales that are quantized again: a little
  larger.
- moeflow keeps cached experts in host memory as well, so Colab's {colab} do not hold all experts and the rest is read
  from its disk, at an assumed {disk}: the column T4 (Colab) is that disk's. The paper's program ran there, so it
  needs less host memory. The last column is the same GPU with {more} of host memory, which is supposed; the paper's
  3-bit figures are of another cloud's T4, whose memory is not known here.
- The model describes the device-driven engine. Naive offloading is host-driven, and so is whatever reads from the
  disk: there Python, launches and copies that the host begins come on top, which the model does not know, so those
  figures are too high by that. Naive offloading overlaps the next layer's copy with computing here, which the paper's
  does not.
- A "-" is what does not fit, or what the paper does not have.
"""


def _profile(bits: int, strategy: Strategy, k: int | None) -> Profile:
    quantization = Quantization(experts=EXPERTS[bits], attention=HqqScheme(bits=4, group_size=64))
    cache = Cache(experts_per_layer="auto" if k is None else k)
    return Profile(model=MODEL, quantization=quantization, strategy=strategy, cache=cache)


def _machines() -> dict[str, tuple[str, HardwareProfile]]:
    """Heading -> the paper's machine and what stands for it."""
    found = {heading: (name, find_hardware(name)) for name, heading in NAMES.items()}
    roomy = find_hardware("t4").model_copy(update={"ram": MORE_RAM})
    return found | {f"T4, {format_size(MORE_RAM)} RAM": ("t4", roomy)}


def _planned(machine: HardwareProfile, sizes: ModelSizes, profile: Profile) -> Plan | None:
    try:
        return make_plan(profile, sizes, machine)
    except MoeflowError as refusal:
        print(f"{machine.name}, {profile.strategy}: {refusal}", file=sys.stderr)
        return None


def _speed(plan: Plan | None) -> str:
    if plan is None or plan.prediction is None:
        return "-"
    return f"{three_digits(plan.prediction.tokens_per_second)} ({plan.prediction.range})"


def _k(plan: Plan | None) -> str:
    if plan is None or plan.prediction is None:
        return "-"
    few, most = min(plan.cache_slots), max(plan.cache_slots)
    where = f"; {format_size(plan.disk_nbytes)} on disk" if plan.disk_nbytes else ""
    return f"{few if few == most else f'{few} or {most}'}; {plan.prediction.hit_rate:.0%}{where}"


def _block(bits: int, rows: Iterable[Strategy], papers_k: bool) -> list[str]:
    """One table, in lines."""
    checkpoint, machines = config_checkpoint(architecture(MODEL), MODEL), _machines()

    def plans(strategy: Strategy) -> list[Plan | None]:
        profiles = [_profile(bits, strategy, K[name] if papers_k else None) for name, _ in machines.values()]
        sizes = ModelSizes.of_checkpoint(checkpoint, profiles[0].quantization)
        return [_planned(m, sizes, p) for (_, m), p in zip(machines.values(), profiles, strict=True)]

    made = {row: plans(row) for row in rows}
    lines = [_line(f"{bits} bits", machines), _line("---", ["---"] * len(machines))]
    lines.append(_line("k; hits", map(_k, made["full"])))
    for row, found in made.items():
        measured = [MEASURED[bits][name].get(row) for name, _ in machines.values()]
        lines.append(_line(f"{ROWS[row]}: PREDICTED", map(_speed, found)))
        lines.append(_line(f"{ROWS[row]}: paper, measured", (f"{m:.3f}" if m else "-" for m in measured)))
    return lines


def _line(name: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([name, *cells])} |"


def page() -> str:
    """The whole page."""
    colab = find_hardware("t4")
    assert colab.disk is not None, "Colab has one"
    links = [f"{NAMES[name]} {format_rate(find_hardware(name).link.host_to_device)}" for name in NAMES]
    parts: list[Sequence[str]] = [[HEAD.format(context=Profile(model=MODEL).context_length)]]
    parts.append(["## With the paper's k\n"])
    parts += [[*_block(bits, ROWS, papers_k=True), ""] for bits in EXPERTS]
    parts.append(["## With the k that the planner chooses\n", "Rows without a cache have no k: they stand above.\n"])
    parts += [[*_block(bits, CACHED, papers_k=False), ""] for bits in EXPERTS]
    tail = TAIL.format(
        links=", ".join(links),
        recall=RECALL,
        colab=format_size(colab.ram),
        disk=format_rate(colab.disk.read),
        more=format_size(MORE_RAM),
    )
    return "\n".join(line for part in parts for line in part) + "\n" + tail


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_text(Path(sys.argv[1]), page())
    else:
        print(page(), end="")
