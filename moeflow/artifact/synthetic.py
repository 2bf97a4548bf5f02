"""Checkpoints and manifests of models that are nowhere on disk: names and shapes without a byte of weights.

transformers builds the model on the meta device and names its tensors as a release does, so that a synthetic
checkpoint goes through the same family declaration, blueprint and planner as a real one, and a new family needs
nothing here. What only bytes can tell stays empty: digests are "", errors 0. Neither quantizes nor allocates;
torch and transformers are imported when a checkpoint is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from moeflow.artifact.blueprint import RESIDENT_SHARD, Blueprint
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.safetensors import ITEM, TensorInfo
from moeflow.errors import CheckpointError
from moeflow.schema import Manifest, Quantization, Shard

__all__ = ["synthetic_checkpoint", "synthetic_manifest"]

_STORED = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


def synthetic_checkpoint(config: Mapping[str, Any], source: str = "synthetic") -> Checkpoint:
    """The checkpoint that transformers would save of this config: headers only, nothing can be read from it.

    Args:
        config: as in a config.json. Its `quantization_config` is left out: shapes are those of plain weights.
        source: what errors call the model.

    Raises:
        CheckpointError: moeflow does not know the family, or transformers refuses the config.
    """
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    file = Path(source)
    tensors = {
        name: TensorInfo(file, name, dtype, shape, 0, prod(shape) * ITEM[dtype])
        for name, (dtype, shape) in _tensors(plain, source).items()
    }
    return Checkpoint(file, plain, tensors)


def _tensors(config: Mapping[str, Any], source: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name on disk -> dtype and shape, of every tensor of the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if f"torch.{dtype}" not in _STORED:
        raise CheckpointError(f"{source}: dtype is {dtype!r}; supported: float32, bfloat16, float16")
    try:
        with torch.device("meta"):
            built = AutoConfig.for_model(**config)
            model = AutoModelForCausalLM.from_config(built, dtype=getattr(torch, dtype))
        tied = model.all_tied_weights_keys  # stored once, under the other name
        stored = revert_weight_conversion(model, {n: t for n, t in model.state_dict().items() if n not in tied})
    except Exception as error:  # whatever a family's code makes of numbers that do not fit each other
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: transformers cannot build a model of this config: {reason}") from error
    return {name: (_STORED[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in stored.items()}


def synthetic_manifest(config: Mapping[str, Any], quantization: Quantization, source: str = "synthetic") -> Manifest:
    """The manifest of the artifact that this model would make; shards are counted without headers.

    Raises:
        CheckpointError: moeflow does not know the family, or transformers refuses the config.
        DocumentError: a group size does not fit the model's dimensions.
    """
    blueprint = Blueprint(synthetic_checkpoint(config, source), source, quantization)
    layers = []
    shards = []
    for position, layer in enumerate(blueprint.checkpoint.layers):
        count = len(layer.experts)
        layers.append(blueprint.expert_layer(position, data_offset=0, digests=[""] * count, relative_error=0.0))
        nbytes = blueprint.blobs_nbytes(position)
        shards.append(Shard(file=blueprint.shard(position), nbytes=nbytes, sha256=""))
    shards.append(Shard(file=RESIDENT_SHARD, nbytes=blueprint.resident_nbytes, sha256=""))
    return blueprint.manifest(layers, shards, resident_error=0.0, files={})
