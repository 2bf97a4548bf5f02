"""Who computes the experts that the device lacks: resolves a profile's `cpu` section for a model on a machine.

Beside a GPU misses are shared only where the device drives, since the split is decided inside its graph, and where all
layers have a format that the CPU's kernels multiply. Without a GPU the kernels replace torch's arithmetic wherever they
can. It knows rates and predictions, no threads and no kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeflow.errors import CapacityError, DocumentError
from moeflow.planning.cost import Running, predict
from moeflow.planning.cpu_rates import FORMATS, CpuRates, computes, usual_threads
from moeflow.planning.rates import Rates
from moeflow.planning.sizes import LayerSize, ModelSizes
from moeflow.schema import HardwareProfile, PlannedCpu, Prefetch, Profile

__all__ = ["GAIN", "in_place", "planned_cpu", "shared", "without_slots"]

GAIN = 1.05  # of the speed without: below it a prediction does not tell that sharing pays
EVEN = 0.5  # the first share where nobody knows a rate


def without_slots(profile: Profile, hardware: HardwareProfile) -> Profile:
    """`profile` as it runs if the CPU is to compute all experts beside a device: none is cached, none guessed."""
    driven = hardware.gpu is not None or profile.execution == "device"
    if profile.cpu.experts != "only" or not driven:
        return profile
    cache = profile.cache.model_copy(update={"experts_per_layer": 0})
    return profile.model_copy(update={"cache": cache, "prefetch": Prefetch(predictor="none", depth=0)})


def in_place(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile) -> Profile | None:
    """`profile` as it runs if the CPU, without a GPU, multiplies all experts where they lie: nothing is copied.

    None where that is not what the profile asks for: slots, guesses or an ablation, which are about copies, or weights
    that the kernels do not multiply. Whether host memory holds all experts then is for whoever plans to see.
    """
    cache, prefetch = profile.cache, profile.prefetch
    copying = cache.experts_per_layer not in ("auto", 0) or cache.trace is not None or profile.strategy != "full"
    copying = copying or (prefetch.predictor != "none" and prefetch.depth not in ("auto", 0))
    able = hardware.gpu is None and profile.execution != "device" and profile.cpu.experts != "off"
    if copying or not able or not all(map(computes, sizes.layers)):
        return None
    cache = cache.model_copy(update={"experts_per_layer": 0})
    return profile.model_copy(update={"cache": cache, "prefetch": Prefetch(predictor="none", depth=0)})


def planned_cpu(profile: Profile, sizes: ModelSizes, hardware: HardwareProfile, running: Running) -> PlannedCpu | None:
    """The CPU's part, or None where it has none.

    Raises:
        CapacityError: more threads are asked for than there are cores.
        DocumentError: a part is asked for that this model, machine or execution does not allow.
    """
    asked = profile.cpu
    if asked.experts == "off":
        return None
    threads = _threads(profile, hardware)
    device = running.execution == "device"
    if asked.activations == "int8" and (device or hardware.gpu):
        raise DocumentError(
            "cpu.activations is int8; beside a GPU the CPU has to compute what the GPU does, to the last bit: "
            "set it to fixed16"
        )
    if not device and hardware.gpu is None:
        if asked.experts != "auto":
            _check_layers(profile, sizes)
        part = PlannedCpu(threads=threads, share=1.0, fixed=True, activations=asked.activations)
        return part if any(map(computes, sizes.layers)) else None
    if asked.experts == "auto":
        return _paying(sizes, hardware, running, threads) if device and hardware.gpu else None
    if not device:
        raise DocumentError(
            f"cpu.experts is {asked.experts}; beside a GPU that needs the device to drive, which takes all experts in "
            "host memory, a strategy other than naive and execution other than host (without a GPU the CPU computes "
            "all experts anyway): raise memory.ram or memory.vram, or set cpu.experts to auto"
        )
    _check_layers(profile, sizes)
    return shared(sizes, hardware, threads, alone=asked.experts == "only")


def _threads(profile: Profile, hardware: HardwareProfile) -> int:
    asked, cores = profile.cpu.threads, hardware.cpu.cores
    if asked == "auto":
        return usual_threads(hardware)
    if asked > cores:
        raise CapacityError(
            f"cpu.threads is {asked}; {hardware.name} has {cores} core{'s' if cores > 1 else ''} for this process: "
            "lower it or set it to auto"
        )
    return asked


def _check_layers(profile: Profile, sizes: ModelSizes) -> None:
    """All layers' experts are the kernels' to multiply, or the first that are not are named."""
    for number, layer in enumerate(sizes.layers):
        if not computes(layer):
            what = "experts of several formats" if layer.blobs else f"experts of format {layer.format}"
            raise DocumentError(
                f"cpu.experts is {profile.cpu.experts}; the CPU's kernels multiply {', '.join(sorted(FORMATS))}, one "
                f"format in a layer, and MoE layer {number} has {what}: set it to auto"
            )


def _paying(sizes: ModelSizes, hardware: HardwareProfile, running: Running, threads: int) -> PlannedCpu | None:
    """Sharing, where all that it rests on was measured and the model gains by it."""
    if not all(map(computes, sizes.layers)) or (rates := _rates(hardware, threads)) is None:
        return None
    if not rates.knows(layer.format for layer in sizes.layers):
        return None
    part = shared(sizes, hardware, threads)
    before, then = (predict(sizes, hardware, replace(running, cpu=cpu)) for cpu in (None, part))
    pays = before is not None and then is not None and then.tokens_per_second > GAIN * before.tokens_per_second
    return part if pays else None


def shared(sizes: ModelSizes, hardware: HardwareProfile, threads: int, alone: bool = False) -> PlannedCpu:
    """So many threads of the CPU beside a device, which share misses with the link or, `alone`, compute all experts."""
    rates = _rates(hardware, threads)
    formats = [layer.format for layer in sizes.layers]
    share = 1.0 if alone else _share(sizes.layers, rates) if rates and rates.known(formats) else EVEN
    return PlannedCpu(threads=threads, share=round(share, 3), fixed=alone, activations="fixed16")


def _share(layers: Sequence[LayerSize], rates: CpuRates) -> float:
    """Over all layers, as bytes are missed in them."""
    return sum(y.mean_nbytes * rates.share(y.format) for y in layers) / sum(y.mean_nbytes for y in layers)


def _rates(hardware: HardwareProfile, threads: int) -> CpuRates | None:
    rates = Rates.of(hardware)
    return CpuRates.of(hardware, threads, rates.kernel_link) if rates else None
