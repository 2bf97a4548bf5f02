"""What the primitives and the collectives must compute, against numpy and exact fractions, for any launcher.

The emulator runs these in the ordinary suite and a GPU under the marker gpu, so the two cannot drift apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

from moeflow.kernels.launcher import Launcher

__all__ = ["CHECKS"]

BLOCK = 128
Check = Callable[[Launcher, torch.device], None]


def draw() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


def words(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.integers(0, 1 << 32, count, dtype=np.uint32)


def on(device: torch.device, array: np.ndarray) -> Tensor:
    signed = {"uint32": np.int32, "uint16": np.int16}.get(str(array.dtype))
    return torch.from_numpy(array.view(signed) if signed else array).to(device)


def blank(device: torch.device, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.full(shape, 77, dtype=dtype, device=device)


def blocks(count: int) -> int:
    return -(-count // BLOCK)


def same_numbers(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit, except that any NaN equals any other."""
    both = np.isnan(found) & np.isnan(expected)
    kind = f"u{found.dtype.itemsize}"
    different = np.flatnonzero((found.view(kind) != expected.view(kind)) & ~both)
    assert not different.size, f"{different.size} differ; first at {different[0]}: {found[different[0]]!r}"


def check_dots(launcher: Launcher, device: torch.device) -> None:
    n = 3000
    generator = draw()
    a, b, c = (words(generator, n) for _ in range(3))
    out = blank(device, n, 2)
    launcher.kernel("probe.cu", "dots")(blocks(n), BLOCK, on(device, a), on(device, b), on(device, c), out, n)
    signed = b.view(np.int8).reshape(n, 4).astype(np.int64)
    for column, kind in enumerate((np.uint8, np.int8)):
        exact = (a.view(kind).reshape(n, 4).astype(np.int64) * signed).sum(1) + c.view(np.int32)
        assert np.array_equal(out[:, column].cpu().numpy(), exact.astype(np.uint32).view(np.int32))


def floats_to_narrow(generator: np.random.Generator) -> np.ndarray:
    """Any bits; the range of halves and below; halves, what lies between two, and the next floats on both sides."""
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (half[:-1] + half[1:]) / 2
    ties = between[np.isfinite(between)]
    scaled = (generator.standard_normal(20000) * np.exp2(generator.integers(-30, 18, 20000))).astype(np.float32)
    edges = np.array([65519.996, 65520, 65536, 1e30, np.inf, np.nan, 2**-25, 2**-24, 2**-14, 0.0], np.float32)
    some = np.concatenate([ties, half[np.isfinite(half)], edges])
    beside = [np.nextafter(some, np.float32(side)) for side in (np.inf, -np.inf)]
    return np.concatenate([words(generator, 20000).view(np.float32), scaled, some, -some, *beside])


def check_narrowing(launcher: Launcher, device: torch.device) -> None:
    with np.errstate(all="ignore"):
        x = floats_to_narrow(draw())
        expected = x.astype(np.float16)
    half, bf16 = (blank(device, len(x), dtype=torch.int16) for _ in range(2))
    launcher.kernel("probe.cu", "narrow")(blocks(len(x)), BLOCK, on(device, x), half, bf16, len(x))
    same_numbers(half.cpu().numpy().view(np.float16), expected)
    same_numbers(
        bf16.view(torch.bfloat16).float().cpu().numpy(), torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    )


def check_widening(launcher: Launcher, device: torch.device) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    half, bf16 = (blank(device, len(bits), dtype=torch.float32) for _ in range(2))
    launcher.kernel("probe.cu", "widen")(blocks(len(bits)), BLOCK, on(device, bits), half, bf16, len(bits))
    same_numbers(half.cpu().numpy(), bits.view(np.float16).astype(np.float32))
    same_numbers(bf16.cpu().numpy(), (bits.astype(np.uint32) << 16).view(np.float32))


@cache
def halves() -> list[Fraction]:
    """The halves from zero on, and 65536 in infinity's place."""
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    return [*map(Fraction, finite.astype(float).tolist()), Fraction(65536)]


def nearest_half(value: Fraction) -> float:
    table, size = halves(), abs(value)
    below = min(bisect_right(table, size) - 1, len(table) - 2)
    low, high = table[below], table[below + 1]
    up = size - low > high - size or (size - low == high - size and below % 2 == 1)
    rounded = high if up else low
    number = float("inf") if rounded == 65536 else float(rounded)
    return -number if value < 0 else number


def exactly(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in half precision, rounded once."""
    results = []
    for x, y, z in zip(a.astype(float).tolist(), b.astype(float).tolist(), c.astype(float).tolist(), strict=True):
        plain = x * y + z  # exact enough where a number is infinite or none
        results.append(nearest_half(Fraction(x) * Fraction(y) + Fraction(z)) if np.isfinite(plain) else plain)
    return np.array(results)


def check_pairs(launcher: Launcher, device: torch.device) -> None:
    n = 3000
    generator = draw()
    a, b, c = (words(generator, n).view(np.float16) for _ in range(3))
    a[:200] = generator.integers(0, 0x400, 200, dtype=np.uint16).view(np.float16)  # subnormal
    c[:100] = generator.integers(0, 0x400, 100, dtype=np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        c[1000:2000] = -(a[1000:2000] * b[1000:2000])  # what is left over is the product's own rounding
        c[2000:2500] = np.float16(1.0)
        a[2000:2500] = np.exp2(generator.integers(-14, -10, 500)).astype(np.float16)  # ties, or next to them
        b[2000:2500] = np.exp2(generator.integers(-14, 4, 500)).astype(np.float16)
    out = blank(device, 4, n)
    pairs = [on(device, x.view(np.uint32)) for x in (a, b, c)]
    launcher.kernel("probe.cu", "pairs")(blocks(n), BLOCK, *pairs, out, n)
    found = out.cpu().numpy().view(np.float16)
    one, zero = np.ones_like(a), np.zeros_like(a)
    with np.errstate(all="ignore"):
        for row, expected in enumerate((exactly(a, b, c), exactly(a, one, b), exactly(a, b, zero))):
            assert np.array_equal(found[row].astype(float), expected, equal_nan=True), ("fma", "add", "mul")[row]
    same_numbers(found[3].reshape(n, 2)[:, ::-1].reshape(-1), a)


def check_loads(launcher: Launcher, device: torch.device) -> None:
    n = 1000
    data = torch.randint(-(1 << 31), 1 << 31, (n, 4), dtype=torch.int32, device=device)
    if device.type == "cuda":
        data = data.cpu().pin_memory()
    copies, flags = blank(device, 2, n, 4), blank(device, n)
    flag = torch.tensor([12345], dtype=torch.int32, device=device)
    launcher.kernel("probe.cu", "loads")(blocks(n), BLOCK, data, copies[0], copies[1], flag, flags, n)
    assert torch.equal(copies.cpu(), data.cpu().expand(2, n, 4))
    assert (flags == 12345).all()


def check_bits(launcher: Launcher, device: torch.device) -> None:
    generator = draw()
    edges = np.array([0, 0xFFFFFFFF, *(1 << i for i in range(32))], np.uint32)
    near = np.concatenate([generator.uniform(-3e9, 3e9, 500), np.arange(-5, 5) + 0.5, [np.inf, -np.inf, np.nan]])
    x = np.concatenate([words(generator, 2000), edges, near.astype(np.float32).view(np.uint32)])
    n, out = len(x), blank(device, 7, len(x))
    launcher.kernel("probe.cu", "bits")(blocks(n), BLOCK, on(device, x), out, n)
    values = x.tolist()
    reversed_ = np.array([int(f"{v:032b}"[::-1], 2) for v in values], np.uint32).view(np.int32)
    flipped = [(v, v ^ 0xFFFFFFFF) for v in values]
    picked = [(v & 255) | (f >> 8 & 255) << 8 | (v >> 24) << 16 | (f >> 24) << 24 for v, f in flipped]
    # Selector 0x7350: bytes 0, 5, 3 and 7 of (v, ~v), lowest first.
    with np.errstate(invalid="ignore"):
        rounded = np.nan_to_num(np.rint(x.view(np.float32).astype(float)), nan=0.0, posinf=2.0**31, neginf=-(2.0**31))
    expected = [
        [v.bit_count() for v in values],
        [(v & -v).bit_length() for v in values],
        [32 - v.bit_length() for v in values],
        reversed_,
        np.array(picked, np.uint32).view(np.int32),
        np.clip(x.view(np.int32), -1000, 1000),
        np.clip(rounded, -(2**31), 2**31 - 1),
    ]
    for row, right in enumerate(expected):
        assert np.array_equal(out[row].cpu().numpy(), np.asarray(right).astype(np.int64)), row


def check_floats(launcher: Launcher, device: torch.device) -> None:
    n = 4000
    generator = draw()
    a, b, c = (generator.standard_normal(n).astype(np.float32) for _ in range(3))
    c[:1000] = -a[:1000] * b[:1000]
    a[3900:3950] = np.nan
    out = blank(device, 5, n, dtype=torch.float32)
    launcher.kernel("probe.cu", "floats")(blocks(n), BLOCK, on(device, a), on(device, b), on(device, c), out, n)
    # float64 holds the product exactly; the sum's own rounding there is far below where float32 rounds.
    fused = (a.astype(float) * b + c).astype(np.float32)
    for row, right in enumerate((a * b + c, fused, np.fmax(a, b), np.fmin(a, b), np.rint(a))):
        same_numbers(out[row].cpu().numpy(), right)


def shuffled(x: list[float], by: list[int], width: int) -> list[list[float]]:
    """What CUDA's reference says, lane by lane."""
    rows: list[list[float]] = [[], [], [], [], []]
    for t in range(len(x)):
        lane, warp = t % 32, t - t % 32
        first = lane // width * width
        sources = [first + by[t] % width, lane - by[0], lane + by[0], lane ^ by[0], lane ^ (3 if lane & 16 else 5)]
        sources[1] = lane if sources[1] < first else sources[1]
        sources[2] = lane if sources[2] >= first + width else sources[2]
        sources[3] = lane if sources[3] >= first + width else sources[3]
        for row, source in zip(rows, sources, strict=True):
            row.append(x[warp + source])
    return rows


def check_shuffles(launcher: Launcher, device: torch.device) -> None:
    generator = draw()
    types = {"int": torch.int32, "float": torch.float32, "double": torch.float64, "long long": torch.int64}
    for (name, dtype), width in zip(types.items(), (32, 16, 8, 2), strict=True):
        x = torch.from_numpy(generator.integers(-1000, 1000, 96)).to(dtype)
        by = generator.integers(0, 32, 96, dtype=np.int32)
        out = blank(device, 5, 96, dtype=dtype)
        launcher.kernel("meeting.cu", "shuffles", {"T": name, "WIDTH": width})(1, 96, x.to(device), on(device, by), out)
        assert out.tolist() == shuffled(x.tolist(), by.tolist(), width), (name, width)


def check_votes(launcher: Launcher, device: torch.device) -> None:
    generator = draw()
    x = generator.integers(0, 2, 128, dtype=np.int32)
    x[32:64], x[64:96] = 0, 5
    out = blank(device, 3, 128)
    launcher.kernel("meeting.cu", "votes")(1, 128, on(device, x), out)
    warps = x.reshape(4, 32) != 0
    ballot = np.packbits(warps, axis=1, bitorder="little").view(np.int32)
    expected = [np.repeat(row, 32) for row in (ballot.reshape(-1), warps.any(1), warps.all(1))]
    assert np.array_equal(out.cpu().numpy(), np.array(expected))


def check_sums(launcher: Launcher, device: torch.device) -> None:
    for threads, n in ((256, 1000), (96, 500), (32, 40)):
        x = torch.randint(-100, 100, (n,), device=device).float()
        out = blank(device, -(-n // threads), dtype=torch.float32)
        launcher.kernel("meeting.cu", "sum")(len(out), threads, x, out, n)
        assert out.tolist() == [part.sum().item() for part in x.split(threads)]


def check_atomics(launcher: Launcher, device: torch.device) -> None:
    grid, threads = 5, 96
    total = grid * threads
    counts, largest, ticket, swapped = (torch.zeros(size, dtype=torch.int32, device=device) for size in (8, 1, 1, 1))
    wide = torch.zeros(1, dtype=torch.int64, device=device)
    part = torch.zeros(1, device=device)
    taken = blank(device, total)
    launcher.kernel("meeting.cu", "atomics")(grid, threads, counts, wide, largest, part, ticket, taken, swapped)
    assert counts.tolist() == [total // 8] * 8
    assert wide.item() == total << 33
    assert largest.item() == max(i ^ 21 for i in range(total))
    assert part.item() == total / 4
    assert sorted(taken.tolist()) == list(range(total))
    assert swapped.item() == sum(range(total))


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): function for name, function in globals().items() if name.startswith("check_")
}
