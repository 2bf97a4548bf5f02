"""transformers' model from an artifact: everything but the experts on the device, the experts through a runner.

The model is made on the meta device, so that no weight is ever allocated twice and no expert at all; resident
parameters are then assigned from the artifact, and packed matrices take the place of their linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moeflow.artifact.matrix import allocate_blobs, segment_view
from moeflow.artifact.predictors import load_predictor
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.artifact.reader import Artifact
from moeflow.artifact.unpacked import UnpackedArtifact
from moeflow.errors import ArtifactError
from moeflow.model.device_experts import DeviceRunner
from moeflow.model.experts import IMPLEMENTATION, ExpertRunner, offloaded_experts
from moeflow.model.learned import learned_guesser, learned_keeper
from moeflow.model.linear import PackedLinear
from moeflow.model.routers import find_routers
from moeflow.offload.predictor import next_gate
from moeflow.schema import Plan

__all__ = ["Runner", "bare_model", "build_model"]


class Runner(Protocol):
    """Computes experts."""

    def run(self, layer: int, module: Any, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum [T, H] of each token's experts, as `ExpertRunner.run` has it."""


def build_model(artifact: Artifact, plan: Plan, runner: ExpertRunner | DeviceRunner, device: torch.device) -> nn.Module:
    """The causal language model of `artifact`, ready to run on `device`, with guesses where the plan has some."""
    dtype = getattr(torch, plan.dtype)
    model = bare_model(artifact, dtype, runner, device)
    guessing = plan.prefetch.depth > 0 and plan.strategy == "full"
    forced = runner.routes  # of benchmarks; they may stand for a predictor, too
    learned = guessing and plan.prefetch.predictor == "learned" and not (forced and forced.guesses)
    if plan.policy == "learned":
        runner.keeper = forced.keeper if forced else None
    if learned or (plan.policy == "learned" and runner.keeper is None):
        _, matrices = load_predictor(artifact)
        launcher = runner.launcher if isinstance(runner, DeviceRunner) else None
        if learned:
            runner.predictor = learned_guesser(matrices, plan.prefetch.experts, plan.prefetch.depth, device, launcher)
        if plan.policy == "learned":
            runner.keeper = learned_keeper(matrices, device, launcher)
    if guessing and not learned:
        routers = find_routers(model, artifact.manifest.layers, plan.prefetch.experts, dtype)
        runner.predictor = next_gate(routers, plan.prefetch.depth) if routers else None
    return model


def bare_model(artifact: Artifact, dtype: torch.dtype, runner: Runner, device: torch.device) -> nn.Module:
    """The causal language model of `artifact`, whose experts `runner` computes."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offloaded_experts)
    config = AutoConfig.from_pretrained(artifact.directory)
    with init_empty_weights(include_buffers=False):  # rotary tables are buffers that no checkpoint holds
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=IMPLEMENTATION)
    for position, layer in enumerate(artifact.manifest.layers):
        experts: Any = model.get_submodule(layer.module)
        for name in list(dict(experts.named_parameters(recurse=False))):
            delattr(experts, name)
        experts.moeflow = (runner, position)
    _assign_resident(model, artifact, dtype, device)
    model.to(device).eval().requires_grad_(False)
    return model


def _assign_resident(model: Any, artifact: Artifact, dtype: torch.dtype, device: torch.device) -> None:
    manifest = artifact.manifest
    read = (
        artifact.resident
        if isinstance(artifact, RandomArtifact | UnpackedArtifact)
        else lambda d, t: _stored(artifact, d, t)
    )
    buffers = {name for name, _ in model.named_buffers()}  # real from the start: without a tensor silently zero
    dense, packed = read(device, _dtypes(model, dtype))
    for matrix in manifest.resident:
        name = matrix.name.removesuffix(".weight")
        bias = dense.pop(f"{name}.bias", None)
        model.set_submodule(name, PackedLinear(matrix, packed[matrix.name], bias, dtype))
    result = model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    missing += [name for name in result.missing_keys if name in buffers]
    unexpected = result.unexpected_keys
    if missing or unexpected:
        raise ArtifactError(
            f"{artifact.directory / manifest.resident_shard}: does not fit transformers' {manifest.model.type}: "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}; pack again with this version of transformers"
        )


def _stored(
    artifact: Artifact, device: torch.device, dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, and the blobs of packed matrices, from the artifact's resident shard."""
    from safetensors import safe_open

    manifest = artifact.manifest
    artifact.resident_header()  # a truncated file is reported by us, with numbers
    parts = {f"{m.name}.{s.part}" for m in manifest.resident for s in m.segments}
    packed = allocate_blobs(manifest.resident, device)
    with safe_open(artifact.directory / manifest.resident_shard, framework="pt") as reader:
        names = [n for n in reader.keys() if n not in parts]  # noqa: SIM118
        dense = {n: reader.get_tensor(n).to(device, dtypes.get(n)) for n in names}
        for matrix in manifest.resident:
            blob = torch.zeros(packed[matrix.name].nbytes, dtype=torch.uint8)
            for segment in matrix.segments:
                segment_view(blob, segment).copy_(reader.get_tensor(f"{matrix.name}.{segment.part}"))
            packed[matrix.name].copy_(blob)
    return dense, packed


def _dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of every parameter and buffer: what the model asks for, as transformers' own loading does.

    Routers choose by small differences, so families keep their correction biases in 32 bits.
    """
    wide = [*(model._keep_in_fp32_modules_strict or ())] if dtype != torch.float32 else []
    if dtype == torch.float16:
        wide += [*(model._keep_in_fp32_modules or ())]
    pattern = re.compile("|".join(wide) or r"(?!)")
    return {n: torch.float32 if pattern.search(n) else t.dtype for n, t in model.state_dict().items()}
