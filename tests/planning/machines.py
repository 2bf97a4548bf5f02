"""A small machine and a small model with round figures, for sums that a reader can do by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeflow.planning.cost import Running
from moeflow.planning.rates import WIDE
from moeflow.planning.sizes import LayerSize, ModelSizes
from moeflow.schema import Cpu, Disk, Gpu, HardwareProfile, Kernels, Link, LinkPoint, Product

__all__ = ["KERNELS", "MACHINE", "PLAIN", "RUNNING", "SIZES", "machine"]

MB, GB = 10**6, 10**9
KERNELS = Kernels(layer=20e-6 / WIDE, products={"4-bit": Product(latency=2e-6, rate=500 * GB)})


def machine(**parts: Any) -> HardwareProfile:
    """Memory 1,000 GB/s, link 10 and 8 by a kernel, disk 1, two cores: too few for the copy engine."""
    return HardwareProfile(
        **{
            "name": "round",
            "origin": "measured",
            "gpu": Gpu(name="g", memory=80 * GB, compute_capability="9.0", memory_bandwidth=1000 * GB, kernels=KERNELS),
            "cpu": Cpu(cores=2, memory_bandwidth=20 * GB),
            "ram": 64 * GB,
            "link": Link(host_to_device=10 * GB, by_size=(LinkPoint(nbytes=MB, engine=10 * GB, kernel=8 * GB),)),
            "disk": Disk(read=GB),
            **parts,
        }
    )


MACHINE = machine()
SIZES = ModelSizes(
    layers=(LayerSize(4, 3 * MB, 10**6, hidden=1000, inner=1000, format="4-bit"),) * 2,
    top_k=2,
    dtype="bfloat16",
    resident_packed=60 * MB,
    resident_dense=45 * MB,
    kv_values_per_token=0,
    max_context=1024,
    embedding=10 * MB,
)
"""Two layers of four experts of 3 MB; a token reads 95 MB beside them."""
RUNNING = Running(slots=(2, 2), ram_experts=(4, 4), strategy="full", guessed=1)
PLAIN = replace(RUNNING, strategy="no-prefetch", guessed=0)
