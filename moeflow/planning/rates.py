"""What a machine's parts take, for the cost model: measured where its profile has it, else as measured elsewhere.

The figures of kernels are of one H100 (docs/cost-model.md), as times where they are bound by latency and as shares of a
rate where they are bound by bytes; on another GPU nobody measured, they are assumptions, and `assumed` names them. The
thresholds of the copy engine are `offload.mover`'s, which this may not import, since that takes torch; a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from moeflow.schema import BitsAndBytesScheme, DenseScheme, HardwareProfile, Scheme

__all__ = ["Launch", "Rates", "format_of"]

LAYER = 33.8e-6
WIDE = 1.27  # of a layer of the small models that the probe runs (26.5 us there): what narrow kernels do not show
OLDER = 1.2  # of a layer before Hopper, whose kernels do not begin while the one before ends: 13 launches, 0.5 us each
LATENT = 113e-6  # with DeepSeek's latent attention, most of which is transformers' own operations
PER_EXPERT = 42e-9  # of a layer's router and lookup, for each expert that it has
DENSE = 0.95  # of the memory's rate, that resident weights are read at
KERNEL_COPY, ENGINE_COPY = 0.92, 0.977  # of the link's rate in large copies
COPY = 5e-6  # until the first byte of a layer's copies
# Where the copy engine brings what the device wants: cores, bytes of gate and up, and bytes of a layer behind the head.
ENGINE_CORES, ENGINE_BLOB, ENGINE_LEAST, ENGINE_HEAD = 4, 4 << 20, 12 << 20, 3 << 20
# Decoding on a CPU, per layer and per weight and core: on two cores of a server the demo model's 8 layers took 22 ms a
# token, OLMoE's 0.8 billion weights of chosen experts about 2 s.
HOST_LAYER, HOST_WEIGHTS = 2.6e-3, 2e8
HOST_KERNEL_LAYER = 0.8e-3  # of a layer whose packed weights the CPU's kernels multiply: the demo model's on two cores
# Bytes of device memory for each weight that torch unpacks where the host drives: Mixtral's shapes on one H100.
DRIVEN_UNPACK = 57
DRIVEN_LAYER = 2.0e-3  # of a layer that the host drives on a GPU: the demo model's 8 took 16 ms a token on one H200


@dataclass(frozen=True)
class Launch:
    """A launch of products: seconds until it runs, and its share of the memory's rate."""

    latency: float
    share: float


PRODUCTS = {
    "2-bit": Launch(3.0e-6, 0.98),
    "3-bit": Launch(4.3e-6, 1.0),
    "4-bit": Launch(1.9e-6, 0.95),
    "8-bit": Launch(2.2e-6, 1.0),
    "2-bit meta8": Launch(3.5e-6, 0.88),
    "nf4": Launch(6.1e-6, 0.83),
    "int8": Launch(3.0e-6, 1.0),
    "none": Launch(3.0e-6, 0.9),
}


def format_of(scheme: Scheme) -> str:
    """What products with weights of this scheme are known by."""
    if isinstance(scheme, DenseScheme):
        return "none"
    if isinstance(scheme, BitsAndBytesScheme):
        return scheme.format
    return f"{scheme.bits}-bit" + (" meta8" if scheme.metadata_bits == 8 else "")


@dataclass(frozen=True)
class Rates:
    """A machine, in bytes a second and seconds."""

    memory: float
    link: float
    """Large copies by the copy engine."""
    kernel_link: float
    """Copies by a kernel."""
    has_engine: bool
    """Whether the copy engine brings what the device asks for, where that is much."""
    disk: float | None
    cores: int
    layer: float
    latent: float
    """Of a layer with latent attention: as much longer as on the H100."""
    products: Mapping[str, Launch]
    assumed: tuple[str, ...] = ()
    """What nobody measured on this machine."""

    @classmethod
    def of(cls, hardware: HardwareProfile) -> Self | None:
        """Of a machine; None where its profile does not know its memory's rate."""
        part = hardware.gpu or hardware.cpu
        if part.memory_bandwidth is None:
            return None
        memory, link, gpu = float(part.memory_bandwidth), float(hardware.link.host_to_device), hardware.gpu
        assumed = [name for name in ("link.host_to_device",) if not hardware.source(name).startswith("measured")]
        points = [point for point in hardware.link.by_size if point.kernel]
        kernel = float(points[-1].kernel or 0) if points else KERNEL_COPY * link
        products = dict(PRODUCTS)
        layer = LAYER * (OLDER if gpu and float(gpu.compute_capability) < 9 else 1)
        if gpu and gpu.kernels:
            layer = WIDE * gpu.kernels.layer
            products |= {n: Launch(p.latency, p.rate / memory) for n, p in gpu.kernels.products.items()}
        elif gpu:
            assumed.append("kernels, as measured on an H100")
        else:
            assumed.append("computing, as measured on two cores of a server")
        return cls(
            memory=memory,
            link=link,
            kernel_link=kernel,
            has_engine=gpu is not None and hardware.cpu.cores >= ENGINE_CORES,
            disk=float(hardware.disk.read) if hardware.disk else None,
            cores=hardware.cpu.cores,
            layer=layer,
            latent=LATENT * layer / LAYER,
            products=products,
            assumed=tuple(assumed),
        )

    def product(self, name: str, nbytes: float) -> float:
        """Seconds of a launch that reads so many bytes of a format."""
        launch = self.products.get(name) or PRODUCTS["4-bit"]
        return launch.latency + nbytes / (launch.share * self.memory)

    def copies(self, nbytes: float, blob: float) -> float:
        """Seconds of a layer's copies, `nbytes` in blobs of `blob`."""
        if nbytes <= 0:
            return 0.0
        large = self.has_engine and blob * 2 / 3 >= ENGINE_BLOB and nbytes - ENGINE_HEAD >= ENGINE_LEAST
        return COPY + nbytes / (ENGINE_COPY * self.link if large else self.kernel_link)
