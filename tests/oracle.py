"""Slow and certain: transformers' own forward, on a checkpoint or on an artifact's dequantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import _quiet
from torch import Tensor

from moeflow.artifact.matrix import dequantize, parts_of
from moeflow.artifact.reader import Artifact
from moeflow.schema import Manifest


def checkpoint_model(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a checkpoint, computed by its own experts loop."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, experts_implementation="eager").eval()


def dequantized_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with every weight of the artifact dequantized."""
    from transformers import AutoConfig, AutoModelForCausalLM

    manifest = Artifact.open(directory).manifest
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    transposed = getattr(model.get_submodule(manifest.layers[0].module), "is_transposed", False)
    state = {**_resident(directory, manifest, dtype), **_experts(directory, manifest, dtype, transposed)}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}  # tied
    return model.eval()


def _resident(directory: Path, manifest: Manifest, dtype: torch.dtype) -> dict[str, Tensor]:
    state = load_file(directory / manifest.resident_shard)
    for matrix in manifest.resident:
        parts = {s.part: state.pop(f"{matrix.name}.{s.part}") for s in matrix.segments}
        state[matrix.name] = dequantize(matrix, parts, dtype)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def _experts(directory: Path, manifest: Manifest, dtype: torch.dtype, transposed: bool) -> dict[str, Tensor]:
    state = {}
    for i, layer in enumerate(manifest.layers):
        blobs = list(load_file(directory / layer.shard).values())
        layouts = [manifest.layout_of(i, expert) for expert in range(layer.experts)]
        for matrices in zip(*(layout.matrices for layout in layouts), strict=True):  # one of each expert
            matrix = matrices[0]
            parts = [parts_of(m, blob) for m, blob in zip(matrices, blobs, strict=True)]
            stacked = torch.stack([dequantize(m, p, dtype) for m, p in zip(matrices, parts, strict=True)])
            state[f"{layer.module}.{matrix.name}_proj"] = stacked.transpose(1, 2) if transposed else stacked
            if matrix.bias:
                state[f"{layer.module}.{matrix.name}_proj_bias"] = torch.stack([p["bias"].to(dtype) for p in parts])
    return state


@torch.inference_mode()
def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    """float32 [T, V]."""
    return model(torch.tensor([list(ids)])).logits[0].float()


@torch.inference_mode()
def greedy_of(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """The likeliest continuation, by recomputing everything for each token."""
    answer: list[int] = []
    for _ in range(count):
        answer.append(int(logits_of(model, [*ids, *answer])[-1].argmax()))
    return answer


@torch.inference_mode()
def decided_ids(model: Any, count: int, gap: float = 0.01) -> list[int]:
    """Random ids on which no router of `model` (softmax, top-k) stands between experts closer than `gap`.

    Kernels that round at 1e-4 may choose another of two experts that score alike, and logits then differ by half.
    """
    closest: list[float] = []

    def note(module: Any, _: object, results: Sequence[Tensor]) -> None:
        scores = results[0].float().topk(module.top_k + 1).values
        closest.append(float((scores[:, -2] - scores[:, -1]).min()))

    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    assert routers, "a model whose routers are found by name"
    handles = [router.register_forward_hook(note) for router in routers]
    try:
        for seed in torch.randint(1 << 30, (300,)).tolist():
            ids = torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
            closest.clear()
            model(torch.tensor([ids]))
            if min(closest) > gap:
                print(f"ids from seed {seed}, routers decided by {min(closest):.3f}")
                return ids
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError("no such ids in 300 prompts")
