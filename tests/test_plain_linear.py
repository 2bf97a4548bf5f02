"""Layers that came in 16 bits stay so on a CPU, and compute what their weights in 32 bits do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families.routes import assert_follows
from oracle import dequantized_model
from test_engine import hardware_file, packed, random_ids
from test_roles import TIED
from tiny import FAMILIES
from torch import Tensor, nn

import moeflow
from moeflow.engine import Engine
from moeflow.kernels.library import why_not
from moeflow.model import plain_linear
from moeflow.model.linear import PackedLinear, use_products
from moeflow.model.plain_linear import keep_sixteen_bits
from moeflow.model.products import PACKED_TOKENS, Products
from moeflow.schema import PlannedCpu

__all__ = ["hardware_file", "packed"]

pytestmark = pytest.mark.skipif(why_not() is not None, reason="no library of CPU kernels")

Packed = Callable[..., Path]
HQQ = {"backend": "hqq", "bits": 4, "group_size": 32}
ROUNDING = 1e-5  # of a product's norm, as in kernels/test_cpu.py
KERNELS = 5e-3  # of the packed experts: as in families/test_forward.py


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_linear, "LEAST", 1)


@pytest.fixture
def products() -> Iterator[Products]:
    made = Products(PlannedCpu(threads=2, share=1.0, fixed=True, activations="fixed16"), [], torch.float32)
    yield made
    made.close()


def linear(weight: Tensor, bias: bool = False) -> nn.Module:
    """A model of one layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight = nn.Parameter(weight)
    return nn.Sequential(layer).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_half_the_bytes(products: Products, dtype: torch.dtype, bias: bool) -> None:
    weight = torch.randn(301, 96).to(dtype).float()
    weight[0, 0] = 2.0**-20 if dtype == torch.float16 else 2.0**100  # which the other dtype does not hold, or rounds
    weight[1, 1] = 1 + 2.0**-10 if dtype == torch.float16 else 2.0**-100
    before, model = linear(weight, bias), linear(weight, bias)
    model.load_state_dict(before.state_dict())
    keep_sixteen_bits(model)
    layer = model[0]
    assert isinstance(layer, PackedLinear) and layer.blob.nbytes == 2 * weight.numel()
    assert torch.equal(layer.weight, weight)
    use_products(model, products)
    for tokens in (1, 7, PACKED_TOKENS, PACKED_TOKENS + 1):
        x = torch.randn(2, tokens, 96)[:1]
        expected, found = before(x).double(), model(x)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert (found - expected).norm() <= ROUNDING * expected.norm()
        if tokens > PACKED_TOKENS:
            assert torch.equal(found, before(x)), "torch's product with the same weights"


@pytest.mark.parametrize("why", ["32 bits", "not a number", "odd columns", "computes in 16 bits", "small", "an heir"])
def test_what_stays_as_it_is(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 48 if why == "odd columns" else 64).bfloat16().float()
    if why == "32 bits":
        weight[-1, -1] = 1 + 2.0**-20
    elif why == "not a number":
        weight[-1, -1] = float("nan")
    elif why == "computes in 16 bits":
        weight = weight.bfloat16()
    elif why == "small":
        monkeypatch.setattr(plain_linear, "LEAST", weight.numel() + 1)
    model = linear(weight)
    if why == "an heir":  # which may do anything else with its weight

        class Other(nn.Linear):
            pass

        model[0].__class__ = Other
    keep_sixteen_bits(model)
    assert isinstance(model[0], nn.Linear) and model[0].weight.data_ptr() == weight.data_ptr()


def test_a_head_that_is_the_embedding_stays_with_it() -> None:
    embedding, head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
    embedding.weight.data = embedding.weight.data.bfloat16().float()
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    keep_sixteen_bits(model)
    assert model["head"] is head


def plain_layers(engine: Engine) -> dict[str, PackedLinear]:
    layers = engine._model.named_modules()
    return {name: m for name, m in layers if isinstance(m, PackedLinear) and m.matrix.scheme.backend == "none"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_compute_what_their_weights_say(
    checkpoint_factory: Callable[..., Path], packed: Packed, family: str
) -> None:
    quantization = {"experts": HQQ, "attention": {"backend": "none"}}
    artifact, ids = packed(checkpoint_factory(family, layers=3), quantization), random_ids(40)
    with moeflow.load(artifact) as engine:
        layers = plain_layers(engine)
        assert ("lm_head" in layers) == (family not in TIED)
        assert len(layers) > ("lm_head" in layers)
        assert_follows(engine, dequantized_model(artifact), ids, (512, 4, 1), KERNELS)
    with moeflow.load(artifact, cpu_experts="off") as engine:
        assert not plain_layers(engine)
