"""The decode attention kernel on the emulator, against plain torch in float64."""

from __future__ import annotations

import random

import pytest
import torch
from attention_checks import BOUNDS, check, check_fresh, oracle, random_case

from moeflow.kernels.attention import Attention, Shape
from moeflow.kernels.launcher import Launcher

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")


def launcher(order: str = "forward") -> Launcher:
    return emulator.EmulatedLauncher(order, seed=random.randrange(1 << 30))


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_groups_and_dtypes(group: int, dtype: torch.dtype, tokens: int) -> None:
    length = random.randrange(3, 200)
    print("length", length)
    check(
        launcher(random.choice(emulator.ORDERS)), *random_case(group=group, dtype=dtype, tokens=tokens, length=length)
    )


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 192, 193, 200])
def test_lengths_around_the_borders_of_shares(length: int) -> None:
    check(launcher("random"), *random_case(length=length))


@pytest.mark.parametrize("length", [63, 64, 65, 4096, 4097, 4223, 4300])
def test_shares_of_several_tiles(length: int) -> None:
    """Beyond 64 tiles a share takes two."""
    case = random_case(heads=1, group=1, width=8, capacity=4300, length=length)
    assert Shape.of(*case[:3]).splits == 64
    check(launcher(), *case)


@pytest.mark.parametrize("length", [1, 64, 65, 128, 129, 193])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_own_keys_are_rotated_and_appended_on_the_way(length: int, tokens: int, dtype: torch.dtype) -> None:
    length = max(length, tokens)
    shape = {"heads": 2, "group": random.choice([1, 4, 12]), "width": random.choice([16, 32, 128])}
    case = random_case(**shape, values=random.choice([16, 24]), tokens=tokens, dtype=dtype, length=length)
    windows, sinks = random.choice([None, 5, 70]), random.choice([None, torch.randn(2 * shape["group"]).to(dtype)])
    check_fresh(launcher(random.choice(emulator.ORDERS)), *case, random.random() < 0.5, windows, sinks)


@pytest.mark.parametrize("widths", [(8, 8), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (128, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths(widths: tuple[int, int], dtype: torch.dtype) -> None:
    case = random_case(
        heads=1, group=3, width=widths[0], values=widths[1], dtype=dtype, length=random.randrange(65, 150)
    )
    check(launcher("reverse"), *case)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_tokens_see_nothing_after_themselves(tokens: int) -> None:
    for length in (tokens, 64, 64 + tokens // 2 + 1, random.randrange(tokens, 200)):
        check(launcher(), *random_case(heads=1, group=4, tokens=tokens, length=length))


@pytest.mark.parametrize("window", [1, 5, 64, 100, 1000])
@pytest.mark.parametrize("tokens", [1, 8])
def test_windows(window: int, tokens: int) -> None:
    for length in (tokens, 70, 164, 200):
        q, k, v, at = random_case(tokens=tokens, length=length)
        first = max(0, length - tokens + 1 - window)
        k[:, :, :first], v[:, :, :first] = torch.nan, torch.nan  # nor is what lies before the window read
        expected = oracle(q, k.nan_to_num(), v.nan_to_num(), length, 0.3, window)
        found = Attention(emulator.EmulatedLauncher("random"))(q, k, v, at, 0.3, window)
        assert (found - expected).abs().max() <= 4e-6


@pytest.mark.parametrize("length", [1, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sinks(length: int, dtype: torch.dtype) -> None:
    sinks = (3 * torch.randn(8)).to(dtype)
    check(launcher(), *random_case(group=4, length=length, dtype=dtype), sinks=sinks)
    check(
        launcher(), *random_case(group=4, length=length, dtype=dtype), sinks=torch.full((8,), 40.0).to(dtype), window=20
    )


def test_large_scores_do_not_overflow() -> None:
    """Rounding of scores near 10,000 shows in the weights, so the bound is loose."""
    for dtype in (torch.float32, torch.float16):
        q, k, v, length = random_case(length=150, dtype=dtype)
        k[:, :, :150] *= 1000
        found = Attention(launcher())(q, k, v, length, 1.0)
        expected = oracle(q, k, v, 150, 1.0)
        assert found.isfinite().all() and (found - expected).abs().max() < 0.1


def test_what_is_no_number_stays_none() -> None:
    q, k, v, length = random_case(length=150, heads=1)
    k[0, 0, 70, 3] = torch.nan
    found = Attention(emulator.EmulatedLauncher())(q, k, v, length, 1.0)
    assert found.isnan().all()


def test_strides() -> None:
    """Keys and values as views of one product, as in latent attention."""
    both = torch.randn(1, 150, 4, 24 + 16)
    k, v = both.transpose(1, 2).split([24, 16], -1)
    check(launcher(), torch.randn(1, 4, 1, 24), k, v, torch.tensor(140))


def test_refusals() -> None:
    q, k, v, length = random_case(length=5)
    refuses = Attention.refuses
    assert refuses(q.double(), k, v, length) and refuses(q, k.half(), v, length) and refuses(q, k, v, length.int())
    assert refuses(q, k, v, length, torch.zeros(4).half()) == "query torch.float32, key torch.float32"
    assert refuses(*random_case(tokens=9, length=9)) == "9 tokens"
    assert refuses(*random_case(width=12, length=9)) == "heads of 12 and 12 numbers"
    assert refuses(*random_case(width=264, length=9)) == "heads of 264 and 264 numbers"
    assert refuses(q[:, :3], k, v, length) == "1 sequences, 3 heads over 2"
    assert refuses(q.expand(2, -1, -1, -1), k, v, length)
    odd = torch.randn(1, 2, 200, 17)[..., :16]
    assert refuses(q, odd, v, length) == "not aligned to 16 bytes"
