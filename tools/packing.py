"""Packs a synthetic Mixtral and compares the speed with the disk's, and the host memory with its bound.

    python tools/packing.py /scratch/packing --gigabytes 20 --bits 2 --group-size 64 --plot memory.png
    python tools/packing.py --against-hqq

The page cache is dropped before each reading, as far as the kernel obeys; a disk in memory shows memory's speed. Phases
overlap, so that their seconds add up to more than the run's; what CUDA does is counted where the host waits for it. One
line of JSON comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scratch_checkpoint import drop_cache, layers_for, write_checkpoint
from watch import Memory, Phases

from moeflow.artifact import matrix, shards
from moeflow.artifact import packer as packer_module
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.artifact.safetensors import ShardWriter
from moeflow.kernels import packing
from moeflow.probe.disk import disk_rates
from moeflow.probe.environment import environment
from moeflow.quantization.hqq import HqqQuantizer
from moeflow.schema import DenseScheme, HqqScheme, Quantization

GIB = 1 << 30
DISK_BYTES = 4 * GIB  # that the disk's rate is measured on, at most
BOUND = 3 * GIB  # of host memory beside one layer


def watched(phases: Phases) -> Phases:
    """Measure what packing consists of; names are those that the callers look up."""
    phases.measure(packer_module, "check_placement", "check names")
    phases.measure(Checkpoint, "read_slice", "read")
    phases.measure(Checkpoint, "read", "read")
    phases.measure(shards, "checked", "check numbers")
    phases.measure(HqqQuantizer, "quantize", "quantize")
    phases.measure(matrix, "pack", "pack")
    phases.measure(matrix, "dequantize", "restore")
    phases.measure(ShardWriter, "write", "hash and write")
    phases.measure(os, "fsync", "fsync")
    return phases


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    folder, tiny = arguments.folder, arguments.tiny
    layers = arguments.layers or layers_for(int(arguments.gigabytes * 1e9), tiny)
    begin = time.perf_counter()
    nbytes = write_checkpoint(folder / "checkpoint", layers, tiny)
    print(f"checkpoint: {layers} layers, {nbytes / 1e9:.2f} GB, {time.perf_counter() - begin:.1f} s", flush=True)
    rates = [disk_rates(folder, nbytes=min(nbytes, DISK_BYTES)).sequential.rate]
    experts = HqqScheme(bits=arguments.bits, group_size=arguments.group_size, metadata_bits=arguments.metadata_bits)
    quantization = Quantization(experts=experts, attention=HqqScheme() if not tiny else DenseScheme())
    checkpoint = Checkpoint.open(folder / "checkpoint")
    layer = sum(checkpoint.tensors[name].nbytes for name in checkpoint.layers[0].tensors)
    packer = Packer(checkpoint, "synthetic", quantization, folder / "artifact")
    HqqQuantizer(experts).quantize(torch.zeros(64, 256, device=packer.device))  # the device's start is no packing
    before = Memory.field("VmRSS:")
    drop_cache(folder / "checkpoint")
    with Memory() as memory, watched(Phases()) as phases:
        begin = time.perf_counter()
        packer.run()
        seconds = time.perf_counter() - begin
    rates.append(disk_rates(folder, nbytes=min(nbytes, DISK_BYTES)).sequential.rate)
    disk = statistics.mean(rates)  # a disk that others use is not the same for long
    return {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment().model_dump(mode="json"),
        "device": str(packer.device),
        "scheme": experts.label,
        "layers": layers,
        "input_bytes": nbytes,
        "output_bytes": sum(file.stat().st_size for file in (folder / "artifact").glob("*.safetensors")),
        "seconds": seconds,
        "input_rate": nbytes / seconds,
        "disk_read": disk,
        "disk_read_before_and_after": rates,
        "of_disk_read": nbytes / seconds / disk,
        "phases": {phase: round(value, 3) for phase, value in phases.seconds.items()},
        "memory_before": before,
        "memory_peak": memory.peak,
        "memory_peak_is_of_packing_alone": memory.reset,
        "memory_bound": BOUND + layer,
        "memory_curve": memory.curve,
    }


def show(found: dict[str, Any]) -> None:
    for key in ("input_rate", "disk_read"):
        print(f"{key.replace('_', ' '):<20}{found[key] / 1e9:.2f} GB/s")
    print(f"{'of disk read':<20}{found['of_disk_read']:.2f}")
    print(f"{'seconds':<20}{found['seconds']:.1f} on {found['device']}, {found['scheme']}")
    for phase, seconds in found["phases"].items():
        print(f"  {phase:<18}{seconds:.1f}")
    for key in ("memory_before", "memory_peak", "memory_bound"):
        print(f"{key.replace('_', ' '):<20}{found[key] / GIB:.2f} GiB")


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 3), layout="constrained")
    seconds, resident = zip(*found["memory_curve"], strict=True)
    panel.plot(seconds, [nbytes / GIB for nbytes in resident], color="#1f5f99", label="resident memory")
    panel.axhline(found["memory_peak"] / GIB, color="#1f5f99", linestyle=":", label="peak")
    panel.axhline(found["memory_bound"] / GIB, color="#9aa5b1", linestyle="--", label="3 GiB and one layer")
    panel.set(xlabel="seconds", ylabel="GiB of host memory", ylim=(0, None))
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    title = (
        f"Packing {found['input_bytes'] / 1e9:.1f} GB, {found['layers']} layers, {found['scheme']}, {found['device']}"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def against_hqq(rounds: int, rows: int, columns: int) -> dict[str, Any]:
    """Times hqq's quantizer with its packing and ours with ours on the same bfloat16 matrices, taking turns."""
    from hqq.core.quantize import Quantizer

    found: dict[str, Any] = {"shape": [rows, columns], "threads": torch.get_num_threads(), "schemes": {}}
    for scheme in (HqqScheme(bits=2, group_size=64), HqqScheme(bits=4, group_size=64)):
        times: dict[str, list[float]] = {"hqq": [], "moeflow": []}
        for turn in range(rounds):
            weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(turn)) * 0.02).bfloat16()
            settings: dict[str, Any] = {"nbits": scheme.bits, "group_size": scheme.group_size, "axis": 1}
            begin = time.perf_counter()
            Quantizer.quantize(weight.float(), bitpack=True, device="cpu", **settings)
            middle = time.perf_counter()
            packing.pack(HqqQuantizer(scheme).quantize(weight).codes, scheme.bits)
            times["hqq"].append(middle - begin)
            times["moeflow"].append(time.perf_counter() - middle)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(times["moeflow"], times["hqq"], strict=True))
        found["schemes"][scheme.label] = {**times, "ratio": ratio}
        theirs, ours = (statistics.median(times[name]) for name in ("hqq", "moeflow"))
        print(f"{scheme.label}: hqq {theirs:.2f} s, moeflow {ours:.2f} s, ratio {ratio:.2f}", flush=True)
    return found


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="holds checkpoint and artifact while it runs; must not exist"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int)
    size.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--metadata-bits", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write all figures here, with the memory curve")
    parser.add_argument("--plot", type=Path, help="write the memory curve here as PNG")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    parser.add_argument("--tiny", action="store_true", help="a model of a few hundred KB, which tests take")
    parser.add_argument("--against-hqq", action="store_true", help="time hqq's quantizer beside ours, on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="of --against-hqq")
    parser.add_argument("--shape", type=int, nargs=2, default=(14336, 4096), help="of --against-hqq")
    arguments = parser.parse_args(given)
    if arguments.against_hqq:
        found = against_hqq(arguments.rounds, *arguments.shape)
    elif arguments.folder is None:
        parser.error("a folder is needed")
    else:
        arguments.folder.mkdir(parents=True)
        try:
            found = measure(arguments)
        finally:
            if not arguments.keep:
                shutil.rmtree(arguments.folder)
        show(found)
        if arguments.plot:
            plot(found, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "memory_curve"}))


if __name__ == "__main__":
    main()
