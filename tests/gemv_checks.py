"""What a launcher's products with packed matrices must fulfil; used with the emulator and with a device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moeflow.artifact.layout import packed_matrix
from moeflow.artifact.matrix import dequantize, parts_of
from moeflow.kernels.gemv import Gate, Gemv, Jobs
from moeflow.kernels.launcher import Launcher
from moeflow.kernels.unpack import Unpacker, Workspace
from moeflow.schema import BitsAndBytesScheme, DenseScheme, HqqScheme, PackedMatrix, Scheme

FORMATS = [
    *(f"hqq {bits} {group}" for bits in (2, 3, 4, 8) for group in (16, 64, 128)),
    *(f"hqq {bits} {group} 8" for bits in (2, 3, 4, 8) for group in (16, 64)),
    "nf4", "int8", "none float32", "none float16", "none bfloat16", "biased",
]  # fmt: skip

# Activations in 16-bit fixed point, a scale per 16 to 64 of them, differ from float32 by 1.1e-5 of their norm; sums
# with cancellation and inputs of very different size raise that. Halves, which nf4 takes, by 2^-11.
BOUNDS = {"nf4": 2e-3, "none float32": 1e-5, "none float16": 1e-5, "none bfloat16": 1e-5}
BOUND = 3e-4


def matrix_of(name: str, rows: int, columns: int) -> PackedMatrix:
    kind, *numbers = name.split()
    schemes: dict[str, Scheme] = {
        "nf4": BitsAndBytesScheme(format="nf4"),
        "int8": BitsAndBytesScheme(format="int8"),
        "none": DenseScheme(),
        "biased": HqqScheme(bits=4, group_size=32),
    }
    scheme = schemes.get(kind)
    if scheme is None:
        bits, group, *meta = map(int, numbers)
        scheme = HqqScheme.model_validate({"bits": bits, "group_size": group, "metadata_bits": meta[0] if meta else 16})
    dense = numbers[0] if kind == "none" else "float32"
    return packed_matrix("m", rows, columns, scheme, dense, bias=kind == "biased")


def random_pool(matrix: PackedMatrix, count: int) -> Tensor:
    """`count` matrices of random codes and plausible scales, uint8 [count, bytes]."""
    end = max(s.offset + s.nbytes for s in matrix.segments)
    pool = torch.zeros(count, -(-end // 4096) * 4096, dtype=torch.uint8)
    for blob in pool:
        for name, part in parts_of(matrix, blob).items():
            if part.dtype == torch.int32:
                part.random_(-(1 << 31), (1 << 31) - 1)
            elif part.dtype == torch.uint8:
                part.random_(0, 256)
            elif name == "meta_scales":  # scales 0.01 to 0.03, zeros 0 to 3
                part.copy_(torch.tensor([8e-5, 0.01, 0.012, 0.0]).expand(part.shape))
            elif part.dim() == 3:
                part[..., 0], part[..., 1] = 0.01 + 0.02 * torch.rand(part.shape[:-1]), 3 * torch.rand(part.shape[:-1])
            else:
                part.copy_(torch.randn(part.shape).abs() + 0.1 if name == "scales" else torch.randn(part.shape))
    return pool


def weights_of(matrix: PackedMatrix, blob: Tensor) -> tuple[Tensor, Tensor | float]:
    """The oracle's matrix in double, and its bias."""
    parts = parts_of(matrix, blob)
    return dequantize(matrix, parts, torch.float32).double(), parts["bias"].double() if "bias" in parts else 0.0


def check_product(launcher: Launcher, device: torch.device, name: str, tokens: int, rows: int, columns: int) -> None:
    matrix = matrix_of(name, rows, columns)
    pool = random_pool(matrix, 6)
    gemv = Gemv(launcher, matrix, device)
    x = torch.randn(tokens, columns) * torch.exp(torch.randn(columns))
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])  # [T, 2] of five experts
    buffer = torch.randperm(6)  # where each lies
    choices = chosen.flatten()
    if tokens == 1:
        jobs = Jobs(pool.to(device), buffer[choices].int().to(device), 2, 2)
    else:
        order = torch.argsort(choices, stable=True)
        distinct, counts = choices.unique(return_counts=True)
        starts = torch.full((len(choices) + 1,), len(choices))
        starts[: len(distinct)] = counts.cumsum(0) - counts
        found = torch.zeros(len(choices))
        found[: len(distinct)] = buffer[distinct].float()
        tables = (table.int().to(device) for table in (found, starts, order))
        jobs = Jobs(pool.to(device), next(tables), len(choices), 2, *tables)
    result = gemv.multiply(gemv.prepare(x.to(device)), jobs, tokens).double().cpu()
    for place, expert in enumerate(choices.tolist()):
        weights, bias = weights_of(matrix, pool[buffer[expert]])
        expected = weights @ x[place // 2].double() + bias
        error = float((result[place] - expected).norm() / expected.norm())
        assert error <= BOUNDS.get(name, BOUND), (name, error)


def check_gates(launcher: Launcher, device: torch.device, name: str) -> None:
    columns, limit, alpha = 384, 7.0, 1.702
    matrix = matrix_of("hqq 4 64", 8, columns)
    pool, product = random_pool(matrix, 1), torch.randn(2, 2 * columns) * 4
    gemv = Gemv(launcher, matrix, device)
    gate, up = product.double().chunk(2, dim=1)
    if name == "CLAMPED":
        gate, up = product[:, ::2].double().clamp(max=limit), product[:, 1::2].double().clamp(-limit, limit)
        gated = (up + 1) * gate * torch.sigmoid(gate * alpha)
    else:
        activations = {
            "SILU": functional.silu,
            "GELU": functional.gelu,
            "GELU_TANH": lambda t: functional.gelu(t, approximate="tanh"),
            "RELU": functional.relu,
        }
        gated = activations[name](gate) * up
    jobs = Jobs(pool.to(device), torch.zeros(2, dtype=torch.int32, device=device), 2)
    result = gemv.multiply(gemv.prepare(product.to(device), Gate(name, limit, alpha)), jobs).double().cpu()
    expected = gated @ weights_of(matrix, pool[0])[0].T
    assert float((result - expected).norm() / expected.norm()) <= BOUND


def check_not_a_number(launcher: Launcher, device: torch.device, name: str) -> None:
    matrix = matrix_of(name, 8, 384)
    pool = random_pool(matrix, 1).to(device)
    gemv = Gemv(launcher, matrix, device)
    jobs = Jobs(pool, torch.zeros(1, dtype=torch.int32, device=device), 1)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(1, 384, device=device)
        x[0, 77] = bad
        assert not torch.isfinite(gemv.multiply(gemv.prepare(x), jobs)).any()
    assert (gemv.multiply(gemv.prepare(torch.zeros(1, 384, device=device)), jobs) == 0).all()


def check_unpack(launcher: Launcher, device: torch.device, name: str, rows: int, columns: int) -> None:
    matrix = matrix_of(name, rows, columns)
    blob = random_pool(matrix, 1)[0]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        expected = dequantize(matrix, parts_of(matrix, blob), dtype)
        unpack, workspace = Unpacker(launcher, matrix, dtype), Workspace([matrix], dtype, device)
        assert torch.equal(unpack(blob.to(device)).cpu(), expected), (name, dtype)
        assert torch.equal(unpack(blob.to(device), workspace).cpu(), expected), (name, dtype)
