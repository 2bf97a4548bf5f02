"""The engine's own kernels on this GPU, for the cost model: what products take by their bytes, and what a layer takes.

Products are timed in CUDA graphs at the shapes of a model with large experts and of one with small ones; a line through
these times is a latency and a rate. The rest of a layer is what remains of a decoded token of small models in random
weights, whose layers are counted and whose products are known. Nothing here runs without CUDA.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from moeflow.artifact.architectures import architecture
from moeflow.artifact.layout import expert_layout
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.bench import Settings, run_rows
from moeflow.cpu_calibration import SCHEMES
from moeflow.kernels.gemv import Gemv, Jobs, Prepared
from moeflow.kernels.launcher import CudaLauncher, cuda_launcher
from moeflow.planning.rates import DENSE, PER_EXPERT, format_of
from moeflow.planning.sizes import ModelSizes
from moeflow.probe.cuda import event_timer
from moeflow.progress import Progress, silent
from moeflow.schema import BlobLayout, HardwareProfile, Kernels, Product, Profile, Scheme

__all__ = ["SCHEMES", "SHAPES", "SmallModel", "calibrated", "fitted", "graph_seconds", "layer_seconds", "product_times"]

SHAPES = {"mixtral-8x7b": (4096, 14336, 2), "qwen3-30b-a3b": (2048, 768, 8)}
"""Hidden, intermediate and top-k of the models whose products are timed."""
POOL = 512 << 20  # bytes of the matrices that take turns: more than an L2 cache holds
# Layers of a common model's attention and of experts next to nothing, at a prompt that attention reads in several
# shares: with narrower ones and 32 tokens a layer took 23 us where whole models showed 34.
SMALL = {"hidden_size": 2048, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 4}
PROMPT = 512
NAME = "calibration"
QUANTIZATION = {
    "experts": {"backend": "hqq", "bits": 4, "group_size": 64},
    "attention": {"backend": "hqq", "bits": 4, "group_size": 64},
}
DEPTHS = (8, 24)  # layers of the two models: with fewer, the host's own work would be what is timed
RATE_STEP = 1_000_000_000  # bytes a second; finer digits differ from run to run
LEAST = 1e-7  # seconds of a latency, which noise may turn negative
SMALL_MODEL = "transformers.models.mixtral.modeling_mixtral"  # 9 s to import where the disk is cold, so imported beside


def calibrated(hardware: HardwareProfile, progress: Progress = silent) -> HardwareProfile:
    """The profile of this machine's GPU with its kernels measured; without a GPU as it is.

    Raises:
        DeviceError: a kernel cannot be compiled or run.
    """
    if hardware.gpu is None or hardware.gpu.memory_bandwidth is None:
        return hardware
    launcher, products = cuda_launcher(torch.device("cuda")), {}
    progress("compiling", 0, len(SCHEMES) + len(DEPTHS))
    _compile(launcher)
    for done, scheme in enumerate(SCHEMES):
        progress("timing products", done, len(SCHEMES) + len(DEPTHS))
        times = [each for shape in SHAPES.values() for each in product_times(launcher, scheme, *shape)]
        products[format_of(scheme)] = fitted(times)
    models = []
    for done, depth in enumerate(DEPTHS, len(SCHEMES)):
        progress("timing layers", done, len(SCHEMES) + len(DEPTHS))
        models.append(_small_model(hardware, depth))
    few, many = models
    layer = layer_seconds(few, many, products["4-bit"], float(hardware.gpu.memory_bandwidth))
    gpu = hardware.gpu.model_copy(update={"kernels": Kernels(layer=layer, products=products)})
    how = f"measured, moeflow probe, products in CUDA graphs and tokens of models of {DEPTHS[0]} and {DEPTHS[1]} layers"
    return hardware.model_copy(update={"gpu": gpu, "sources": {**hardware.sources, "gpu.kernels": how}})


def product_times(
    launcher: CudaLauncher, scheme: Scheme, hidden: int, intermediate: int, top_k: int
) -> list[tuple[float, float]]:
    """Bytes and seconds of the two products of a layer's chosen experts, gate and up first."""
    layout = expert_layout(hidden, intermediate, scheme, "bfloat16")
    sets = max(2, -(-POOL // (layout.nbytes * top_k)))
    works = _products(launcher, layout, top_k, sets)
    return [(float(top_k * nbytes), graph_seconds(work) / sets) for nbytes, work in works]


def _products(
    launcher: CudaLauncher, layout: BlobLayout, top_k: int, sets: int
) -> Iterator[tuple[int, Callable[[], list[torch.Tensor]]]]:
    """Bytes of each matrix, and what multiplies `top_k` of them `sets` times, other ones each time."""
    device = torch.device("cuda")
    pool = torch.randint(0, 60, (sets * top_k, layout.nbytes), dtype=torch.uint8, device=device)  # finite halves
    order = torch.arange(sets * top_k, dtype=torch.int32, device=device).view(sets, top_k)
    for matrix, share in zip(layout.matrices, (top_k, 1), strict=True):
        gemv = Gemv(launcher, matrix, device)
        x = gemv.prepare(torch.randn(top_k // share, matrix.columns, device=device))
        jobs = [Jobs(pool, row, top_k, share) for row in order]
        yield sum(s.nbytes for s in matrix.segments), partial(_multiply, gemv, x, jobs)


def _multiply(gemv: Gemv, x: Prepared, jobs: Sequence[Jobs]) -> list[torch.Tensor]:
    return [gemv.multiply(x, each) for each in jobs]


def _compile(launcher: CudaLauncher) -> None:
    """Make every kernel of the products ready, 15 s for the first time, while transformers is imported.

    More threads gain nothing: NVRTC compiles one program at a time in a process.
    """
    with ThreadPoolExecutor(1) as pool:
        imported = pool.submit(importlib.import_module, SMALL_MODEL)
        for scheme in SCHEMES:
            for hidden, intermediate, top_k in SHAPES.values():
                layout = expert_layout(hidden, intermediate, scheme, "bfloat16")
                for _, work in _products(launcher, layout, top_k, 1):
                    work()
        imported.result()


def graph_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median of the replays of `work` as a CUDA graph, by events."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    timed = event_timer()
    return statistics.median(timed(graph.replay) for _ in range(repeats))


def fitted(times: Sequence[tuple[float, float]]) -> Product:
    """The line through bytes and seconds of which the relative errors are least."""
    nbytes, seconds = np.array(times).T
    (latency, each), *_ = np.linalg.lstsq(np.column_stack([1 / seconds, nbytes / seconds]), np.ones(len(times)))
    return Product(latency=max(LEAST, round(float(latency), 8)), rate=round(1 / each / RATE_STEP) * RATE_STEP)


@dataclass(frozen=True)
class SmallModel:
    """A model that was run, all its experts cached."""

    sizes: ModelSizes
    seconds: float
    """Of a token."""


def _small_model(hardware: HardwareProfile, layers: int) -> SmallModel:
    profile = Profile.parse({"model": NAME, "context_length": 1024, "quantization": QUANTIZATION}, NAME)
    config = {**architecture("mixtral-8x7b"), **SMALL, "vocab_size": 1024, "num_hidden_layers": layers}
    artifact = RandomArtifact(config, profile.quantization, NAME)
    settings = Settings(profile, routing="uniform", prompt=PROMPT, tokens=96, rows=(), all_hits=True)
    (row,) = run_rows(artifact, hardware, settings)
    assert row.seconds_per_token is not None, "every row has a speed"
    return SmallModel(ModelSizes.of_manifest(artifact.manifest), row.seconds_per_token)


def layer_seconds(few: SmallModel, many: SmallModel, product: Product, memory: float) -> float:
    """What a layer takes beside its products and the bytes of its resident weights."""
    more = len(many.sizes.layers) - len(few.sizes.layers)
    seconds = (many.seconds - few.seconds) / more
    resident = (many.sizes.read_resident - few.sizes.read_resident) / more / (DENSE * memory)
    layer = few.sizes.layers[0]
    products = 2 * product.latency + few.sizes.top_k * layer.mean_nbytes / product.rate
    return max(LEAST, round(seconds - resident - products - PER_EXPERT * layer.experts, 8))
