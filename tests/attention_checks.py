"""What the decode attention kernel must compute, in plain torch and float64; on the emulator and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from moeflow.kernels import dense
from moeflow.kernels.attention import Attention, Fresh
from moeflow.kernels.launcher import Launcher

__all__ = ["BOUNDS", "check", "check_fresh", "oracle", "random_case"]

# Of the largest value, which bounds every result: float32 sums of a few hundred terms; then the result's own rounding.
BOUNDS = {torch.float32: 3e-6, torch.float16: 2.0**-11 + 3e-6, torch.bfloat16: 2.0**-8 + 3e-6}


def oracle(
    q: Tensor, k: Tensor, v: Tensor, length: int, scaling: float, window: int | None = None, sinks: Tensor | None = None
) -> Tensor:
    """[1, T, Hq, V] in float64, by a mask."""
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k[:, :, :length], v[:, :, :length]))
    scores = q @ k.repeat_interleave(group, 1).mT * scaling  # [1, Hq, T, S]
    at = torch.arange(length, device=q.device)
    position = at[length - tokens :, None]
    seen = at <= position
    if window is not None:
        seen &= at > position - window
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(1, -1, tokens, 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2)


def random_case(
    heads: int = 2, group: int = 2, tokens: int = 1, capacity: int = 200, width: int = 16, values: int | None = None,
    dtype: torch.dtype = torch.float32, length: int = 0, device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, keys and values; what lies beyond the length is no number, as nobody may read it."""
    q = (4 * torch.randn(1, tokens, heads * group, width)).to(dtype).transpose(1, 2)
    k = torch.randn(1, heads, capacity, width).to(dtype)
    v = torch.randn(1, heads, capacity, values or width).to(dtype)
    k[:, :, length:], v[:, :, length:] = torch.nan, torch.nan
    return q.to(device), k.to(device), v.to(device), torch.tensor([length], device=device)


def check(
    launcher: Launcher, q: Tensor, k: Tensor, v: Tensor, length: Tensor, window: int | None = None,
    sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """The kernel's result, twice, against the oracle's."""
    assert Attention.refuses(q, k, v, length, sinks) is None
    attention = Attention(launcher)
    scaling = q.shape[3] ** -0.5
    found = attention(q, k, v, length, scaling, window, sinks)
    assert torch.equal(attention(q, k, v, length, scaling, window, sinks), found)  # counters are as they were
    expected = oracle(q, k, v, int(length), scaling, window, sinks)
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max() / v[:, :, : int(length)].double().abs().max()
    assert error <= BOUNDS[q.dtype], error


def check_fresh(
    launcher: Launcher, q: Tensor, k: Tensor, v: Tensor, length: Tensor, halves: bool, window: int | None = None,
    sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """Rotation, growth and attention in one against the three one after another, to the bit: the order is the same."""
    tokens, width = q.shape[2], q.shape[3]
    before = int(length) - tokens
    angles = torch.randn(1, tokens, width // 2) * 10
    angles = angles if halves else torch.cat([angles, angles], -1)
    cos, sin = angles.cos().to(q), angles.sin().to(q)
    new_k = (4 * torch.randn(1, tokens, k.shape[1], width)).to(q).transpose(1, 2)
    new_v = torch.randn(1, tokens, v.shape[1], v.shape[3]).to(q).transpose(1, 2)
    k[:, :, before:], v[:, :, before:] = torch.nan, torch.nan
    attention, scaling = Attention(launcher), width**-0.5
    apart = (k.clone(), v.clone(), torch.full_like(length, before))
    turned = dense.rotate(launcher, q, new_k, cos, sin)
    dense.append(launcher, turned[1], new_v, *apart)
    expected = attention(turned[0], *apart, scaling, window, sinks)
    fresh, at = Fresh(new_k, new_v, cos, sin), torch.full_like(length, before)
    assert Attention.refuses_fresh(q, k, fresh) is None and Attention.refuses(q, k, v, at, sinks) is None
    for _ in range(2):  # counters are as they were
        k[:, :, before:], v[:, :, before:] = torch.nan, torch.nan
        at.fill_(before)
        assert torch.equal(attention(q, k, v, at, scaling, window, sinks, fresh), expected)
        assert int(at) == int(length) and torch.equal(at, apart[2])
        for found, wanted in zip((k, v), apart[:2], strict=True):
            assert torch.equal(found[:, :, : int(at)], wanted[:, :, : int(at)])
            assert found[:, :, int(at) :].isnan().all()
