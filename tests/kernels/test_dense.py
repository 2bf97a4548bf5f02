"""Norm, rotation and cache growth on the emulator, against transformers' own modules and functions."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral import modeling_mixtral
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from moeflow.kernels import dense

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def launcher() -> object:
    return emulator.EmulatedLauncher(random.choice(emulator.ORDERS), seed=random.randrange(1 << 30))


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(torch.randn_like(module.weight))  # type: ignore[operator, arg-type]
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 5, 4096), (1, 3, 4, 16), (2, 8), (1, 8 * 1025), (1, 1, 2880)])
@pytest.mark.parametrize("late", [False, True])
def test_norm_is_the_modules(shape: tuple[int, ...], dtype: torch.dtype, late: bool) -> None:
    module = filled((GptOssRMSNorm if late else MixtralRMSNorm)(shape[-1], eps=1e-5), dtype)
    x = (torch.randn(shape) * 10 ** random.uniform(-3, 3)).to(dtype)
    assert dense.norm_refuses(x, module.weight) is None  # type: ignore[arg-type]
    found = dense.norm(launcher(), x, module.weight, 1e-5, late)  # type: ignore[arg-type]
    expected = module(x)
    assert found.shape == expected.shape and found.dtype == dtype
    # The sums of squares differ by float32 rounding, which moves a rounding to `dtype` by one step now and then.
    step = torch.finfo(dtype).eps
    difference = (found.double() - expected.double()).abs()
    assert (difference <= (2 * step if dtype != torch.float32 else 2e-6) * expected.double().abs()).all()
    if dtype != torch.float32:
        assert (difference > 0).double().mean() < 0.02


def test_norm_of_rows_that_are_not_contiguous() -> None:
    weight, x = torch.randn(16), torch.randn(1, 3, 40)[..., :16]
    expected = dense.norm(launcher(), x.contiguous(), weight, 1e-6)
    assert torch.equal(dense.norm(launcher(), x, weight, 1e-6), expected)


def test_norm_refusals() -> None:
    x = torch.randn(1, 64)
    assert dense.norm_refuses(x, torch.randn(64).half()) == "numbers are torch.float32, the weight is torch.float16"
    assert dense.norm_refuses(x, torch.randn(32)) == "rows of 64 and a weight of 32 numbers"
    assert dense.norm_refuses(x[:, :12], torch.randn(12)) == "rows of 12 and a weight of 12 numbers"
    assert dense.norm_refuses(x, torch.randn(65)[1:]) == "not aligned to 16 bytes"
    assert dense.norm_refuses(x.double(), torch.randn(64).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (1, 1), (32, 8)])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("halves", [False, True])
def test_rotation_is_transformers_to_the_bit(
    heads: tuple[int, int], tokens: int, dtype: torch.dtype, halves: bool
) -> None:
    width = random.choice([2, 16, 96, 128])
    q, k = (torch.randn(1, tokens, h, width).to(dtype).transpose(1, 2) for h in heads)
    angles = torch.randn(1, tokens, width // 2) * 10
    if not halves:
        angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    original = (modeling_gpt_oss if halves else modeling_mixtral).apply_rotary_pos_emb
    assert dense.rotate_refuses(q, k, cos, sin) is None
    for found, expected in zip(dense.rotate(launcher(), q, k, cos, sin), original(q, k, cos, sin), strict=True):
        assert found.shape == expected.shape and torch.equal(found, expected)


def test_rotation_takes_each_half_its_own_angles() -> None:
    q, k, cos, sin = (torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    for found, expected in zip(
        dense.rotate(launcher(), q, k, cos, sin), modeling_mixtral.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert torch.equal(found, expected)


def test_rotation_refusals() -> None:
    q, k, cos = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 2, 16), torch.randn(1, 2, 16)
    refuses = dense.rotate_refuses
    assert refuses(q, k, cos.half(), cos.half()) and refuses(q, k, cos[..., :4], cos[..., :4])
    assert refuses(q, k, cos[:, :1], cos[:, :1]) and refuses(q.expand(2, -1, -1, -1), k, cos, cos)
    assert refuses(q[..., ::2], k[..., ::2], cos[..., :8], cos[..., :8])


def grown(tokens: list[int], dtype: torch.dtype, replaced: bool) -> list[Tensor]:
    """A static layer of transformers after some updates, its own or the kernel's."""
    generator = torch.Generator().manual_seed(1)
    layer = StaticCache(MixtralConfig(num_hidden_layers=1), max_cache_len=12).layers[0]
    for count in tokens:
        k, v = (torch.randn(1, count, 3, width, generator=generator).to(dtype).transpose(1, 2) for width in (16, 24))
        if not replaced:
            layer.update(k, v)
            continue
        if not layer.is_initialized:
            layer.lazy_initialization(k, v)
        arguments = (k, v, layer.keys, layer.values, layer.cumulative_length)
        assert dense.append_refuses(*arguments) is None
        dense.append(launcher(), *arguments)
    return [layer.keys, layer.values, layer.cumulative_length]


@pytest.mark.parametrize("dtype", DTYPES)
def test_appending_is_the_static_layers(dtype: torch.dtype) -> None:
    for tokens in ([1], [3, 1, 8], [8, 4]):
        for found, expected in zip(grown(tokens, dtype, True), grown(tokens, dtype, False), strict=True):
            assert torch.equal(found, expected)


def test_nothing_is_written_beyond_the_capacity() -> None:
    keys, values, length = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), torch.tensor(4)
    new = torch.randn(1, 2, 3, 8)
    dense.append(launcher(), new, new, keys, values, length)
    assert int(length) == 7 and not keys[:, :, :4].any() and torch.equal(keys[:, :, 4], new[:, :, 0])


def test_append_refusals() -> None:
    k, keys, length = torch.randn(1, 2, 1, 8), torch.zeros(1, 2, 5, 8), torch.tensor(0)
    refuses = dense.append_refuses
    assert refuses(k, k, keys, keys, length) is None
    assert refuses(k, k, keys.half(), keys.half(), length) and refuses(k, k, keys, keys, length.int())
    assert refuses(k, k[:, :1], keys, keys, length) and refuses(k, k, keys[..., :4], keys, length)
    assert refuses(k[..., :4], k[..., :4], keys[..., :4].contiguous(), keys[..., :4].contiguous(), length)
