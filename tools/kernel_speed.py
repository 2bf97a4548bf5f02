"""How near the kernels come to the device's limits: products at real shapes, copies from registered memory.

Run on a CUDA device: `python tools/kernel_speed.py`; `--sweep` tries other shares of rows and threads for the products:
the numbers in `Gemv._share` come from there. Each product is timed in a CUDA graph over several copies of its matrices,
more than the L2 cache holds, by events; the memory's and the copy engine's own rates come from the same run.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial

import torch

from moeflow.artifact.layout import expert_layout, packed_matrix
from moeflow.calibration import SCHEMES, SHAPES, graph_seconds, product_times
from moeflow.kernels.copy import COPY_BLOCKS, COPY_THREADS, PIECE
from moeflow.kernels.gemv import Gate, Gemv, Jobs
from moeflow.kernels.launcher import CudaLauncher, cuda_launcher
from moeflow.kernels.pages import PORTABLE_AND_MAPPED
from moeflow.offload.device import WARPS
from moeflow.probe.bandwidth import device_rate, link_rate
from moeflow.schema import HqqScheme

DEVICE = torch.device("cuda")
GIB = 1 << 30


def products(launcher: CudaLauncher, bandwidth: float) -> None:
    print(f"{'expert products':<38}{'us each':>9}{'GB/s':>8}{'of memory':>11}")
    for model, (hidden, intermediate, top_k) in SHAPES.items():
        for scheme in SCHEMES:
            layout = expert_layout(hidden, intermediate, scheme, "bfloat16")
            times = product_times(launcher, scheme, hidden, intermediate, top_k)
            for matrix, (nbytes, each) in zip(layout.matrices, times, strict=True):
                rate = nbytes / each
                name = f"{model} {scheme.label} {matrix.name}"
                print(f"{name:<38}{each * 1e6:>9.1f}{rate / 1e9:>8.0f}{rate / bandwidth:>11.2f}")
            wide = torch.randn(top_k, 2 * intermediate, device=DEVICE)
            down = Gemv(launcher, layout.matrices[1], DEVICE)
            gated = graph_seconds(lambda d=down, w=wide: [d.prepare(w, Gate("SILU")) for _ in range(32)]) / 32
            print(f"{'  gate and prepare':<38}{gated * 1e6:>9.1f}")


def sweep(launcher: CudaLauncher, bandwidth: float) -> None:
    """Every matrix with other rows a warp and threads a block; the best three first."""
    four = HqqScheme(bits=4)
    shapes = [(s, *shape) for s in SCHEMES for shape in ((28672, 4096, 2, 2), (4096, 14336, 2, 1))]
    shapes += [(four, 6144, 4096, 1, 1), (four, 4096, 4096, 1, 1), (four, 1536, 2048, 8, 8), (four, 2048, 768, 8, 1)]
    for scheme, rows, columns, count, share in shapes:
        matrix = packed_matrix("m", rows, columns, scheme, "bfloat16")
        nbytes = sum(s.nbytes for s in matrix.segments)
        stride = -(-nbytes // 4096) * 4096
        sets = max(2, -(-(300 << 20) // (stride * count)))  # more than L2 holds
        pool = torch.randint(0, 60, (sets * count, stride), dtype=torch.uint8, device=DEVICE)
        jobs = [Jobs(pool, row, count, share) for row in torch.arange(sets * count, device=DEVICE).int().view(sets, -1)]
        found = []
        for chosen in itertools.product((1, 2, 4), (128, 256)):
            gemv = Gemv(launcher, matrix, DEVICE)
            gemv._share = lambda *_, chosen=chosen: chosen  # type: ignore[method-assign]
            x = gemv.prepare(torch.randn(count // share, columns, device=DEVICE))
            found.append((graph_seconds(lambda g=gemv, x=x, js=jobs: [g.multiply(x, j) for j in js], 7) / sets, chosen))
        best = [f"{c}: {t * 1e6:.1f} us, {nbytes * count / t / bandwidth:.2f}" for t, c in sorted(found)[:3]]
        print(f"{scheme.label:<16}{f'{rows} x {columns} x {count}':<20}{'   '.join(best)}")


def copies(launcher: CudaLauncher, peak: float) -> None:
    """The copy kernel on one blob after another, as misses are, from memory registered as the store does it."""
    print(f"{'copies from registered memory':<38}{'us each':>9}{'GB/s':>8}{'of engine':>11}")
    for blob in (55_050_240, 2_654_208):
        count = max(2, (GIB // 2) // blob)
        host = torch.empty(count * blob + PIECE, dtype=torch.uint8)
        host = host[-host.data_ptr() % PIECE :][: count * blob].fill_(1)
        torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, PORTABLE_AND_MAPPED)
        pool = torch.empty(2, blob, dtype=torch.uint8, device=DEVICE)
        jobs = torch.tensor([[i, i % 2, -1] for i in range(count)], dtype=torch.int32, device=DEVICE)
        one = torch.ones(1, dtype=torch.int32, device=DEVICE)
        progress = torch.zeros(1, WARPS, dtype=torch.int32, device=DEVICE)
        counters = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        for blocks in (COPY_BLOCKS, 2 * COPY_BLOCKS, 4 * COPY_BLOCKS):
            defines = {"GUESSES": 1, "WARPS": blocks * COPY_THREADS // 32}
            kernel = launcher.kernel("copy.cu", "copy", defines)
            tables = (one, progress, 0, blob // PIECE, counters, None, None, None, 0)
            launch = partial(kernel, blocks, COPY_THREADS, host, pool, blob)
            each = graph_seconds(lambda go=launch, rest=tables, js=jobs: [go(job, *rest) for job in js]) / count
            rate = blob / each
            name = f"{blob / 1e6:.1f} MB, {blocks} blocks"
            print(f"{name:<38}{each * 1e6:>9.1f}{rate / 1e9:>8.1f}{rate / peak:>11.2f}")
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(host.data_ptr())


def main() -> None:
    launcher = cuda_launcher(DEVICE)
    bandwidth, peak = device_rate(GIB).rate, link_rate(GIB).rate
    print(f"{torch.cuda.get_device_name()}: memory {bandwidth / 1e9:.0f} GB/s, copy engine {peak / 1e9:.1f} GB/s")
    if "--sweep" in sys.argv:
        sweep(launcher, bandwidth)
        return
    products(launcher, bandwidth)
    copies(launcher, peak)


if __name__ == "__main__":
    main()
