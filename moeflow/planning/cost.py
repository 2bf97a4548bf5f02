"""What a decoded token and a prompt cost in seconds, as a sum of named parts; docs/cost-model.md derives it.

A pure function of shapes, rates and habits of routing. Computing is weights read once at the memory's rate, and
launches that are bound by latency. Copies for misses come in between, less what of them the first product hides;
guesses fill the time in which the link would idle, and what they bring need not be missed. The number of misses in a
layer is taken to be binomial. It does not know batches, nor what a busy host delays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb

from moeflow.planning.cpu_rates import HANDSHAKE, CpuRates, computes
from moeflow.planning.hits import Habit, hit_rates_of
from moeflow.planning.rates import (
    DENSE,
    DRIVEN_LAYER,
    DRIVEN_UNPACK,
    HOST_KERNEL_LAYER,
    HOST_LAYER,
    HOST_WEIGHTS,
    PER_EXPERT,
    Rates,
)
from moeflow.planning.sizes import LayerSize, ModelSizes
from moeflow.schema import DecodeTime, HardwareProfile, PlannedCpu, Prediction, PrefillTime
from moeflow.schema.profile import Execution, Strategy

__all__ = ["Running", "predict", "RECALL"]

RECALL = 0.8
"""Share of guesses that are assumed to be right where nobody measured the model's."""
HIDING = 10e-6  # of each layer's computing that no guess travels in: its lookup, and the guess's own
PROMPT = 512  # tokens of the prompt whose prefill is predicted
PREFILL_EXPERT = 46e-6  # until the host has launched what an expert's tokens need
PREFILL_LATENT = 5.8e-3  # of a layer with latent attention
UNPACK = 4  # bytes moved beside the packed ones for a weight that is unpacked to 16 bits and read again
FLOPS = 150  # of a large product, for each byte that the device's memory moves meanwhile
MARGIN, UNMEASURED = 0.1, 0.25  # of a prediction's range: with measured rates, and without


@dataclass(frozen=True)
class Running:
    """How a model runs: what of a plan its speed depends on."""

    slots: Sequence[int]
    """k per layer."""
    ram_experts: Sequence[int]
    """Experts in host memory, per layer; the others are on disk."""
    strategy: Strategy = "full"
    execution: Execution = "device"
    guessed: int = 0
    """Experts guessed per layer; 0: none."""
    cpu: PlannedCpu | None = None
    """The CPU's part."""

    def beside(self, hardware: HardwareProfile, rates: Rates) -> CpuRates | None:
        """Of the CPU that shares misses with the link; None where it does not."""
        if self.cpu is None or hardware.gpu is None or self.execution == "host":
            return None
        return CpuRates.of(hardware, self.cpu.threads, rates.kernel_link)

    @property
    def alone(self) -> bool:
        """Whether the CPU computes all experts beside the device."""
        return self.cpu is not None and self.cpu.fixed

    def in_place(self, layer: int, hardware: HardwareProfile) -> bool:
        """Whether a layer's experts are multiplied where they lie in the one memory of a machine without GPU."""
        able = self.cpu is not None and hardware.gpu is None and self.strategy in ("full", "no-prefetch")
        return able and not self.slots[layer]


@dataclass
class _Token:
    """One token's seconds and bytes, summed over layers."""

    experts: float = 0.0
    launches: float = 0.0
    misses: float = 0.0
    disk: float = 0.0
    cpu: float = 0.0
    hidden: float = 0.0
    missed: float = 0.0
    guessed: float = 0.0
    wasted: float = 0.0
    computed: float = 0.0
    hits: float = 0.0

    @property
    def seconds(self) -> float:
        """All but what is read of resident weights."""
        return self.experts + self.launches + self.misses + self.disk + self.cpu


def predict(
    sizes: ModelSizes,
    hardware: HardwareProfile,
    running: Running,
    hits: Sequence[float] | None = None,
    recall: float = RECALL,
) -> Prediction | None:
    """Seconds and bytes of a token and of a prompt; None where the hardware profile lacks a rate that is needed.

    Args:
        sizes: of the model.
        hardware: its rates; `Rates` says what stands in for kernels that were not measured.
        running: how it runs.
        hits: hit rate of each layer, from a trace or a measurement; None: as assumed, and the range tells how far that
            may be off.
        recall: share of guesses that are right.
    """
    rates = Rates.of(hardware)
    on_disk = any(n < layer.experts for n, layer in zip(running.ram_experts, sizes.layers, strict=True))
    if rates is None or (on_disk and rates.disk is None):
        return None
    beside = running.beside(hardware, rates)
    if beside and not beside.known(layer.format for layer in sizes.layers):
        return None
    given = hits is not None
    found = _token(
        sizes, rates, hardware, running, hits if hits is not None else _assumed(sizes, running, "markov"), recall
    )
    dense = sizes.read_resident / (DENSE * rates.memory)
    decode = DecodeTime(
        dense=dense,
        experts=found.experts,
        launches=found.launches,
        misses=found.misses,
        disk=found.disk,
        cpu=found.cpu,
    )
    least = decode.total
    if not given:  # routes without habits, and guesses that bring nothing
        worst = _token(sizes, rates, hardware, running, _assumed(sizes, running, "uniform"), 0.5)
        least = dense + worst.seconds
    assumed = _unmeasured(sizes, hardware, rates, running)
    given = given or all(running.in_place(number, hardware) for number in range(len(sizes.layers)))
    margin = UNMEASURED if assumed else MARGIN
    return Prediction(
        tokens_per_second=_digits(1 / decode.total),
        low=_digits((1 - margin) / max(least, decode.total)),
        high=_digits((1 + margin) / decode.total),
        hit_rate=_digits(found.hits / len(sizes.layers)),
        missed_bytes=round(found.missed),
        guessed_bytes=round(found.guessed),
        wasted_bytes=round(found.wasted),
        read_bytes=_read_bytes(sizes, found if hardware.gpu else None),
        computed_bytes=round(found.computed),
        hidden=_digits(found.hidden),
        decode=decode.rounded(),
        prefill=_prefill(sizes, rates, hardware, running).rounded(),
        assumed=(*assumed, *(() if given else ("routes repeat as Mixtral's do",))),
    )


def _read_bytes(sizes: ModelSizes, found: _Token | None) -> int:
    """Of device memory, for a token; `found` is None without a GPU, where all memory is the device's."""
    experts = sum(sizes.top_k * layer.mean_nbytes for layer in sizes.layers)
    return round(sizes.read_resident + experts - (found.computed if found else 0))


def _unmeasured(sizes: ModelSizes, hardware: HardwareProfile, rates: Rates, running: Running) -> list[str]:
    """What the prediction takes from other machines."""
    found = list(rates.assumed)
    gpu = hardware.gpu
    if gpu is None:
        cpu = _cpu_kernels(hardware, running)
        if cpu is None or not all(map(computes, sizes.layers)):
            return found
        own = cpu.unmeasured(layer.format for layer in sizes.layers)
        return ["the host's work for a layer, as measured on two cores of a server", *own]
    if running.execution == "host":
        return [*found, "the host's work for a layer, as measured on an H100 and an H200"]
    formats = {layer.format for layer in sizes.layers}
    if beside := running.beside(hardware, rates):
        found += beside.assumed(formats, joint=not running.alone)
    if gpu.kernels and (missing := sorted(formats - gpu.kernels.products.keys())):
        found.append(f"products with {', '.join(missing)} weights, as measured on an H100")
    if sizes.latent:
        found.append("latent attention's share of a layer, as measured on an H100")
    return found


def _assumed(sizes: ModelSizes, running: Running, habit: Habit) -> list[float]:
    return hit_rates_of([layer.experts for layer in sizes.layers], running.slots, sizes.top_k, habit)


def _token(
    sizes: ModelSizes, rates: Rates, hardware: HardwareProfile, running: Running, hits: Sequence[float], recall: float
) -> _Token:
    total = _Token()
    beside = running.beside(hardware, rates)
    dense = sizes.read_resident / (DENSE * rates.memory) / len(sizes.layers)
    for number, layer in enumerate(sizes.layers):
        hit = hits[number] if running.strategy in ("full", "no-prefetch") else 0.0
        total.hits += hit
        share = 0.0 if beside is None else 1.0 if running.alone else beside.share(layer.format)
        first, second, fixed = _computing(sizes, layer, rates, hardware, running, 1 - share * (1 - hit))
        total.experts += first + second
        total.launches += fixed
        if running.strategy == "naive":
            _streamed(total, layer, rates, first + second + fixed + dense)
        elif running.in_place(number, hardware):
            total.computed += (
                sizes.top_k * layer.mean_nbytes * layer.of_first(running.ram_experts[number]) / layer.nbytes
            )
        elif beside and running.alone:
            nbytes = sizes.top_k * layer.mean_nbytes
            total.computed += nbytes
            total.cpu += nbytes / beside.alone(layer.format) + 2 * HANDSHAKE
        else:
            guesses = running.guessed if running.strategy == "full" and number else 0
            compute = first + second + fixed + dense
            driven = running.execution == "host"
            behind = first + second if driven else first
            link = _Link(rates, layer, beside, share)
            _missed(total, sizes.top_k, link, hit, (behind, compute), (guesses, recall), driven)
        copied = layer.experts if running.strategy == "naive" else sizes.top_k * (1 - hit)
        away = 1 - layer.of_first(running.ram_experts[number]) / layer.nbytes
        total.disk += copied * layer.mean_nbytes * away / rates.disk if away and rates.disk else 0.0
    return total


def _cpu_kernels(hardware: HardwareProfile, running: Running) -> CpuRates | None:
    """Of a machine without GPU whose experts they multiply; None where torch does."""
    return CpuRates.of(hardware, running.cpu.threads, 0.0) if running.cpu and hardware.gpu is None else None


def _computing(
    sizes: ModelSizes, layer: LayerSize, rates: Rates, hardware: HardwareProfile, running: Running, kept: float
) -> tuple[float, float, float]:
    """Seconds of a layer's two products, and of all else that does not depend on bytes.

    `kept` is the share of the chosen experts' bytes that the CPU does not take off the device.
    """
    if hardware.gpu is None:
        seconds = sizes.top_k * layer.weights / (rates.cores * HOST_WEIGHTS)
        cpu = _cpu_kernels(hardware, running)
        if cpu and computes(layer):
            seconds = sizes.top_k * layer.mean_nbytes / cpu.alone(layer.format)
        return seconds * 2 / 3, seconds / 3, HOST_KERNEL_LAYER if cpu else HOST_LAYER
    nbytes = kept * sizes.top_k * layer.mean_nbytes
    if running.execution == "host":  # weights are unpacked in memory, then multiplied
        seconds = (nbytes + DRIVEN_UNPACK * sizes.top_k * layer.weights) / rates.memory
        return seconds * 2 / 3, seconds / 3, DRIVEN_LAYER
    first = rates.product(layer.format, nbytes * 2 / 3)
    return (
        first,
        rates.product(layer.format, nbytes / 3),
        (rates.latent if sizes.latent else rates.layer) + PER_EXPERT * layer.experts,
    )


@dataclass(frozen=True)
class _Link:
    """What brings a layer's missing bytes: copies, beside the CPU that computes a share of them where it shares."""

    rates: Rates
    layer: LayerSize
    beside: CpuRates | None
    share: float

    def seconds(self, nbytes: float) -> float:
        """Until all of `nbytes` are there or computed."""
        if self.beside is None:
            return self.rates.copies(nbytes, self.layer.mean_nbytes)
        return nbytes / sum(self.beside.beside(self.layer.format))


def _missed(
    total: _Token,
    top_k: int,
    link: _Link,
    hit: float,
    computing: tuple[float, float],
    guessing: tuple[int, float],
    driven: bool,
) -> None:
    """Add a layer's misses, less what computing hides, and the guesses that came before them.

    `computing` is what copies may hide behind, and all of the layer's. On the device that is the first product, behind
    the copies of down; the host computes the experts that are there while all others travel.
    """
    blob = link.layer.mean_nbytes
    (behind, compute), (guessed, recall) = computing, guessing
    hideable = 1.0 if driven else 1 / 3
    needed = exposed = copying = 0.0
    for count, probability in _binomial(top_k, 1 - hit):
        nbytes = count * blob
        needed += probability * nbytes
        seconds = link.seconds(nbytes)
        copying += probability * seconds
        exposed += probability * (seconds - min(hideable * seconds, behind))
    window = max(0.0, compute - HIDING - (1 - hit**top_k) * behind) * link.rates.kernel_link
    brought = sum(p * min(n * blob, window) for n, p in _binomial(guessed, 1 - hit)) if guessed else 0.0
    used = min(recall * brought, needed)
    share = used / needed if needed else 0.0
    total.missed += (1 - link.share) * (needed - used)
    total.computed += link.share * (needed - used)
    total.cpu += 2 * HANDSHAKE * (1 - hit**top_k) * (1 - share) if link.beside else 0.0
    total.guessed += brought
    total.wasted += brought - used
    total.misses += exposed * (1 - share)
    total.hidden += copying - exposed * (1 - share)


def _streamed(total: _Token, layer: LayerSize, rates: Rates, compute: float) -> None:
    """Add a whole layer that travels while the one before computes."""
    seconds = layer.nbytes / rates.link
    total.missed += layer.nbytes
    total.misses += max(0.0, seconds - compute)
    total.hidden += min(seconds, compute)


def _binomial(count: int, probability: float) -> Iterator[tuple[int, float]]:
    for n in range(count + 1):
        yield n, comb(count, n) * probability**n * (1 - probability) ** (count - n)


def _prefill(sizes: ModelSizes, rates: Rates, hardware: HardwareProfile, running: Running) -> PrefillTime:
    """Of a prompt that meets an empty cache: every expert travels, while those before it compute."""
    link = sum(layer.nbytes for layer in sizes.layers) / rates.link
    on_disk = sum(y.nbytes - y.of_first(n) for y, n in zip(sizes.layers, running.ram_experts, strict=True))
    weights = sum(layer.experts * layer.weights for layer in sizes.layers)
    if hardware.gpu is None:
        compute = weights / (rates.cores * HOST_WEIGHTS)
    else:
        packed = sum(layer.nbytes for layer in sizes.layers)
        active = sum(sizes.top_k * layer.weights for layer in sizes.layers)
        compute = (packed + UNPACK * weights) / rates.memory + 2 * PROMPT * active / (FLOPS * rates.memory)
        compute += sum(
            layer.experts * PREFILL_EXPERT + (PREFILL_LATENT if sizes.latent else 0.0) for layer in sizes.layers
        )
    return PrefillTime(
        tokens=PROMPT, link=link, compute=compute, disk=on_disk / rates.disk if on_disk and rates.disk else 0.0
    )


def _digits(value: float) -> float:
    """Four significant digits: a prediction has no more."""
    return float(f"{value:.4g}")
