"""The dense part's kernels on a CUDA device, at Mixtral's shapes and inside a CUDA graph."""

from __future__ import annotations

import random

import pytest
import torch
from attention_checks import check, oracle, random_case
from test_fused import LENGTH, logits, static, tiny
from transformers.models.mixtral import modeling_mixtral

from moeflow.kernels import dense
from moeflow.kernels.attention import Attention
from moeflow.kernels.launcher import CudaLauncher, cuda_launcher
from moeflow.model.fused import fuse
from moeflow.model.step import DecodeStep

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def cuda() -> CudaLauncher:
    return cuda_launcher(torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_attention_at_mixtrals_shape(cuda: CudaLauncher, dtype: torch.dtype, tokens: int) -> None:
    for length in (tokens, 63, 64, 65, 1000, 4096, random.randrange(tokens, 4096)):
        shape = {"heads": 8, "group": 4, "width": 128, "capacity": 4096}
        case = random_case(**shape, tokens=tokens, dtype=dtype, length=length, device="cuda")
        check(cuda, *case)
        check(cuda, *case, window=100, sinks=torch.randn(32, device="cuda").to(dtype))


@pytest.mark.parametrize(
    "shape",
    [(16, 1, 192, 128, 4096), (4, 8, 128, 128, 32768), (8, 8, 64, 64, 2048), (2, 2, 256, 256, 300), (4, 3, 96, 96, 99)],
)  # fmt: skip
def test_attention_at_other_shapes(cuda: CudaLauncher, shape: tuple[int, int, int, int, int]) -> None:
    heads, group, width, values, capacity = shape
    for length in (1, capacity, random.randrange(1, capacity)):
        settings = {"heads": heads, "group": group, "width": width, "values": values, "capacity": capacity}
        check(cuda, *random_case(**settings, dtype=torch.bfloat16, length=length, device="cuda"))


def test_attention_in_a_graph_follows_the_length(cuda: CudaLauncher) -> None:
    q, k, v, length = random_case(heads=8, group=4, width=128, capacity=4096, length=4096, device="cuda")
    attention, graph = Attention(cuda), torch.cuda.CUDAGraph()
    attention(q, k, v, length, 0.1)  # compiles, and makes the workspace
    with torch.cuda.graph(graph):
        out = attention(q, k, v, length, 0.1)
    for valid in (1, 64, 65, 4096, 2, 777):
        length.fill_(valid)
        graph.replay()
        assert (out - oracle(q, k, v, valid, 0.1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rotation_and_growth(cuda: CudaLauncher, dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 3, 4096, device="cuda").to(dtype), torch.randn(4096, device="cuda").to(dtype)
    module = modeling_mixtral.MixtralRMSNorm(4096, eps=1e-5).cuda().to(dtype)
    module.weight.data = weight
    expected = module(x).double()
    difference = (dense.norm(cuda, x, weight, 1e-5).double() - expected).abs()
    assert (difference <= 4 * torch.finfo(dtype).eps * expected.abs()).all()
    q, k = (torch.randn(1, 3, heads, 128, device="cuda").to(dtype).transpose(1, 2) for heads in (32, 8))
    cos, sin = torch.randn(2, 1, 3, 128, device="cuda").to(dtype)
    rotated = modeling_mixtral.apply_rotary_pos_emb(q, k, cos, sin)
    assert all(map(torch.equal, dense.rotate(cuda, q, k, cos, sin), rotated))
    keys, values = torch.zeros(2, 1, 8, 64, 128, device="cuda").to(dtype)
    length = torch.tensor(7, device="cuda")
    dense.append(cuda, k, k.flip(2), keys, values, length)
    assert torch.equal(keys[:, :, 7:10], k) and torch.equal(values[:, :, 7:10], k.flip(2)) and int(length) == 10
    assert not keys[:, :, :7].any() and not values[:, :, 10:].any()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_captured_step_gives_the_cpus_logits(cuda: CudaLauncher, family: str) -> None:
    """float32, as on the CPU without fusion; experts of transformers itself cannot be captured, so a dense model."""
    model, ids = tiny(family), torch.randint(96, (LENGTH,))
    expected = logits(model, static(model), [ids], None)
    model = model.cuda()
    cache = static(model)
    for layer in cache.layers:
        layer.cumulative_length = layer.cumulative_length.cuda()
    fused = fuse(model, cuda, cache)
    assert set(fused.replaced) == {"norms", "rotary function", "cache layers", "attention"}
    step = DecodeStep(model, cache, torch.device("cuda"))
    with fused.active():
        step.capture()
    with torch.inference_mode():
        cache.reset()
        found = torch.cat([step.run([int(token)], at) for at, token in enumerate(ids)]).cpu()
    assert float((found - expected).abs().max() / expected.abs().max()) < 5e-5
    assert not fused.kept
