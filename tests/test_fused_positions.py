"""Rotary tables that a CUDA graph can hold, against transformers' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PhimoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralRotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from moeflow.model.fused import Fused
from moeflow.model.fused_positions import fuse_positions
from moeflow.model.inputs import Inputs

LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, "short_mscale": 1.2,
    "long_mscale": 1.6, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
}  # fmt: skip


class OnDevice(TorchDispatchMode):
    """What a CUDA graph refuses: values read by the host, and copies from it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        assert "_local_scalar_dense" not in name and "scalar_tensor" not in name and "lift_fresh" not in name, name
        return function(*args, **(kwargs or {}))


class Model(nn.Module):
    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.rotary = rotary


def phimoe(**settings: object) -> Model:
    config = PhimoeConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, **settings)
    return Model(PhimoeRotaryEmbedding(config))


def fused_with(model: Model) -> Fused:
    fused = Fused(SimpleNamespace(), SimpleNamespace(layers=[]), torch.float32, Inputs())  # type: ignore[arg-type]
    fuse_positions(fused, model)
    return fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"rope_parameters": LONG}], ids=["default", "long"])
def test_tables_are_transformers_and_stay_on_the_device(settings: dict[str, object], dtype: torch.dtype) -> None:
    model, x = phimoe(**settings), torch.zeros(1, 1, 64, dtype=dtype)
    buffer = model.rotary.inv_freq.clone()
    fused = fused_with(model)
    assert (fused.replaced, fused.kept) == ({"rotary tables": 1}, {})
    assert torch.equal(model.rotary.inv_freq, buffer)

    def tables(start: int, tokens: int) -> Tensor:
        return torch.stack(model.rotary(x, position_ids=torch.arange(start, start + tokens)[None]))

    for start, tokens in ((0, 1), (31, 1), (32, 1), (28, 8), (200, 3)):
        expected = tables(start, tokens)
        positions = torch.arange(start, start + tokens)[None]
        with fused.active(), OnDevice():
            found = torch.stack(model.rotary(x, position_ids=positions))
        assert found.dtype == dtype
        assert torch.allclose(found.float(), expected.float(), rtol=0, atol=torch.finfo(dtype).eps)
    assert "forward" not in vars(model.rotary)


def test_a_graph_would_refuse_transformers_own() -> None:
    model = phimoe(rope_parameters=LONG)
    with pytest.raises(AssertionError), OnDevice():
        model.rotary(torch.zeros(1), torch.arange(1)[None])


def test_another_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = phimoe(rope_parameters=LONG)
    original = model.rotary.rope_init_fn
    monkeypatch.setattr(model.rotary, "rope_init_fn", lambda *a, **k: (original(*a, **k)[0] * calls.pop(), 1.0))
    calls = [3.0, 3.0, 3.0, 3.0, 3.0, 2.0]  # what fuse_positions reads, and what the module's passes then read
    fused = fused_with(model)
    assert not fused.replaced and fused.kept == {"rotary tables": "rotary computes something else"}
    monkeypatch.setattr(model.rotary, "config", SimpleNamespace(rope_parameters={"rope_type": "new"}))
    monkeypatch.setattr(model.rotary, "rope_init_fn", lambda _: (torch.ones(8), 1.0))
    assert fused_with(model).kept == {"rotary tables": "rotary: KeyError: 'short_mscale'"}


def test_tables_that_a_buffer_serves_are_left_alone() -> None:
    fused = fused_with(Model(MixtralRotaryEmbedding(MixtralConfig(hidden_size=64, num_attention_heads=4))))
    assert not fused.replaced and not fused.kept
