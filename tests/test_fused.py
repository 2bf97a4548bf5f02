"""Decoding steps with fused parts against transformers' own, on the emulator: models, engines, what is left alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.models.mixtral import modeling_mixtral

from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.kernels.attention import Attention
from moeflow.model import fused_attention
from moeflow.model.fused import Fused, fuse
from moeflow.pipeline import _plan_for

emulator = pytest.importorskip("emulator.launcher")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="no g++")

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": False,
    "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
SMALL = {"moe_intermediate_size": 32, "num_experts": 4}
LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "num_key_value_heads": 4, "first_k_dense_replace": 1,
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"head_dim": 16}}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {**SMALL, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**SMALL, "head_dim": 16},
    "deepseek_v2": LATENT,
    "gpt_oss": {
        "num_local_experts": 4, "head_dim": 16, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
LENGTH = 80


def tiny(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    config = AutoConfig.for_model(family, **{**COMMON, **{**MODELS, **DENSE}[family], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "sinks" in name:
            parameter.copy_(torch.randn_like(parameter))
    return model


def static(model: Any) -> StaticCache:
    """Layers of full length, also where a window of them would do: what a graph can hold."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    cache.layers = [StaticLayer(max_cache_len=LENGTH) for _ in cache.layers]
    return cache


@torch.inference_mode()
def logits(model: Any, cache: StaticCache, pieces: list[Tensor], fused: Fused | None) -> Tensor:
    """Of all pieces, each a pass; those of at most eight tokens inside `fused.active`."""
    cache.reset()
    found, at = [], 0
    for piece in pieces:
        positions = torch.arange(at, at + len(piece))[None]
        arguments = {"input_ids": piece[None], "position_ids": positions, "past_key_values": cache}
        if fused is not None and len(piece) <= 8:
            with fused.active():
                found.append(model(**arguments).logits[0])
        else:
            found.append(model(**arguments).logits[0])
        at += len(piece)
    return torch.cat(found)


def random_pieces() -> list[Tensor]:
    """A prompt, single tokens across the border of a share, a few together, and single ones again."""
    lengths = [9, 1, 1, 48, 3, *[1] * 6, 4, 1]
    return list(torch.randint(96, (sum(lengths),)).split(lengths))


def kinds(fused: Fused) -> set[str]:
    return set(fused.replaced)


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_the_unfused_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    cache, pieces = static(model), random_pieces()
    expected = logits(model, cache, pieces, None)
    fused = fuse(model, emulator.EmulatedLauncher("random"), cache)
    calls = []
    attend = Attention.__call__
    monkeypatch.setattr(Attention, "__call__", lambda self, *a: calls.append(a[5:]) or attend(self, *a))
    found = logits(model, cache, pieces, fused)
    error = float((found - expected).abs().max() / expected.abs().max())
    print(fused, error)
    assert error < 2e-5
    assert len(calls) == 2 * (len(pieces) - 2)  # layers; the prompt and one long piece are not decoding steps
    if family == "gpt_oss":
        assert {call[0] for call in calls} == {5, None} and calls[0][1] is not None
    wanted = {"norms", "routers", "cache layers", "attention", "rotary function"}
    assert kinds(fused) == (wanted - {"rotary function"} if family == "deepseek_v2" else wanted)
    assert set(fused.kept) == ({"rotary positions"} if family == "deepseek_v2" else set())
    assert torch.equal(logits(model, cache, pieces, None), expected)  # nothing is left behind


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_near_to_the_truth_as_unfused(family: str, dtype: torch.dtype) -> None:
    """The truth: the same weights in float32. Without a router, where a near tie would choose another expert."""
    model, pieces = tiny(family, dtype), random_pieces()
    cache = static(model)
    unfused = logits(model, cache, pieces, None).float()
    fused = fuse(model, emulator.EmulatedLauncher(), cache)
    found = logits(model, cache, pieces, fused).float()
    exact = model.float()
    truth = logits(exact, static(exact), pieces, None)
    errors = [float((x - truth).square().mean().sqrt() / truth.square().mean().sqrt()) for x in (found, unfused)]
    print(errors)
    assert "norms" in fused.replaced and errors[0] < 1.25 * errors[1]


def test_the_model_is_as_it_was_outside() -> None:
    model = tiny("mixtral")
    cache = static(model)
    rotary, norm = modeling_mixtral.apply_rotary_pos_emb, model.model.norm
    fused = fuse(model, emulator.EmulatedLauncher(), cache)

    def replaced() -> list[bool]:
        return [
            modeling_mixtral.apply_rotary_pos_emb is not rotary, "forward" in vars(norm),
            "update" in vars(cache.layers[0]), model.config._attn_implementation == fused_attention.NAME,
        ]  # fmt: skip

    assert replaced() == [False] * 4
    with pytest.raises(KeyboardInterrupt), fused.active():
        assert replaced() == [True] * 4
        with fused.active():
            assert replaced() == [True] * 4
        assert replaced() == [True] * 4
        raise KeyboardInterrupt
    assert replaced() == [False] * 4
    assert model.config._attn_implementation == "sdpa"


def test_nothing_is_kept_alive() -> None:
    """By reference counts alone, as an engine's memory is to be free when it is closed."""
    model = tiny("mixtral")
    cache = static(model)
    fused = fuse(model, emulator.EmulatedLauncher(), cache)
    logits(model, cache, [torch.randint(96, (2,)), torch.randint(96, (1,))], fused)
    norm, layer, attention = weakref.ref(model.model.norm), weakref.ref(cache.layers[0]), weakref.ref(fused.attention)
    gc.disable()
    try:
        del model.model.norm, cache.layers[0], cache, fused
        assert norm() is None and layer() is None and attention() is None
    finally:
        gc.enable()


def test_another_thread_gets_transformers_own() -> None:
    model, pieces = tiny("mixtral"), [torch.randint(96, (6,)), torch.randint(96, (2,))]
    expected = logits(model, static(model), pieces, None)
    fused = fuse(model, emulator.EmulatedLauncher(), static(model))
    found: list[Tensor] = []
    with fused.active():
        thread = threading.Thread(target=lambda: found.append(logits(model, static(model), pieces, None)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


def test_another_cache_padding_and_long_passes_get_the_usual_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("mixtral"), torch.randint(96, (1, 12))
    cache = static(model)
    fused = fuse(model, emulator.EmulatedLauncher(), cache)
    with torch.inference_mode():
        logits(model, cache, [ids[0]], None)  # so that the cache has a length
        expected = model(ids).logits
        padding = torch.tensor([[0] * 3 + [1] * 9])
        padded = model(ids, attention_mask=padding).logits
        monkeypatch.setattr(Attention, "__call__", None)
        with fused.active():
            assert torch.allclose(model(ids).logits, expected, atol=1e-4)
            assert torch.allclose(model(ids[:, :4], past_key_values=DynamicCache()).logits, expected[:, :4], atol=1e-4)
            assert torch.allclose(model(ids, attention_mask=padding).logits, padded, atol=1e-4)
            assert torch.allclose(logits(model, cache, [ids[0]], None), expected[0], atol=1e-4)
            two = model(ids[:, :3].expand(2, -1), past_key_values=static(model)).logits
            assert torch.allclose(two, expected[:, :3].expand(2, -1, -1), atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_the_kernel_declines_gets_the_mask_it_stands_for(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pieces = tiny(family), random_pieces()
    cache = static(model)
    expected = logits(model, cache, pieces, None)
    fused = fuse(model, emulator.EmulatedLauncher(), cache)
    monkeypatch.setattr(Attention, "refuses", lambda *_: "it is Sunday")
    found = logits(model, cache, pieces, fused)
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5
    assert fused.kept["attention"] == "it is Sunday" and "attention not (it is Sunday)" in str(fused)


def test_unknown_arguments_of_attention_are_declined() -> None:
    unknown = fused_attention._unknown
    assert (
        unknown({"scaling": 1.0, "dropout": 0.0, "sliding_window": 4, "softcap": None, "output_attentions": False})
        is None
    )
    assert unknown({"softcap": 30.0, "dropout": 0.1}) == "called with softcap, dropout"
    assert unknown({"is_causal": False}) == "called with is_causal=False"


def test_windows_are_read_from_the_mask_function() -> None:
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_bidirectional_mask_function,
        sliding_window_causal_mask_function,
    )

    assert fused_attention.window_of(causal_mask_function) is None
    assert fused_attention.window_of(sliding_window_causal_mask_function(7)) == 7
    for other in (
        bidirectional_mask_function, chunked_causal_mask_function(4, torch.zeros(1)),
        sliding_window_bidirectional_mask_function(7),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            fused_attention.window_of(other)


def test_other_norms_and_rotations_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mixtral")

    class ShiftedRMSNorm(modeling_mixtral.MixtralRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    model.model.norm.__class__ = ShiftedRMSNorm
    rotary = modeling_mixtral.apply_rotary_pos_emb

    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(q, k, cos.repeat_interleave(2, -1)[..., : q.shape[-1]], sin)

    monkeypatch.setattr(modeling_mixtral, "apply_rotary_pos_emb", interleaved)
    fused = fuse(model, emulator.EmulatedLauncher(), static(model))
    assert fused.replaced["norms"] == 4 and "rotary function" not in fused.replaced
    assert fused.kept["ShiftedRMSNorm"] == "model.norm: computes something else"
    assert fused.kept["rotary positions"] == "modeling_mixtral computes something else"


def test_rolling_windows_are_left_alone() -> None:
    model = tiny("gpt_oss")
    fused = fuse(model, emulator.EmulatedLauncher(), StaticCache(config=model.config, max_cache_len=LENGTH))
    assert fused.replaced["cache layers"] == 1 and "attention" not in fused.replaced
    assert fused.kept["attention"] == "the cache has a StaticSlidingWindowLayer"


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_device_driven_engine(checkpoint_factory: Callable[..., Path], tmp_path: Path, family: str) -> None:
    import moeflow

    none = {"backend": "none"}
    profile = {
        "model": str(checkpoint_factory(family)), "quantization": {"experts": none, "attention": none},
        "hardware": "cpu-2-cores",
    }  # fmt: skip
    opened = Artifact.open(moeflow.pack(profile, tmp_path / "a"))
    plan = _plan_for(opened, {"execution": "device", "context_length": 128, "experts_per_layer": 3})
    ids = torch.randint(96, (70,)).tolist()
    launcher = emulator.EmulatedLauncher("random")
    with Engine(opened, plan, launcher=launcher) as engine:
        execution: Any = engine._execution
        step = execution._step
        unfused = type(step)(execution._model, execution._kv, engine.device)
        execution._step = unfused
        expected = engine.logits(ids, chunk=1)
        fused = fuse(execution._model, launcher, execution._kv)
        run = unfused._pass

        def inside() -> Tensor:
            with fused.active():
                return run()

        unfused._pass = inside
        found = engine.logits(ids, chunk=1)
    assert kinds(fused) == {"norms", "routers", "cache layers", "attention", "rotary function"} and not fused.kept
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5
