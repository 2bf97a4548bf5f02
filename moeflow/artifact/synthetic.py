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

__all__ = [
    "STORED", "Shape", "bare_checkpoint", "config_dtype", "plain_config", "synthetic_checkpoint", "synthetic_manifest",
    "unpacked_manifest",
]  # fmt: skip

Shape = tuple[str, tuple[int, ...]]
"""Dtype in safetensors' names, and shape."""

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""dtype in a config -> in safetensors' names."""


def synthetic_checkpoint(config: Mapping[str, Any], source: str = "synthetic") -> Checkpoint:
    """The checkpoint that transformers would save of this config: headers only, nothing can be read from it.

    Args:
        config: as in a config.json. Its `quantization_config` is left out: shapes are those of plain weights.
        source: what errors call the model.

    Raises:
        CheckpointError: moeflow does not know the family, or transformers refuses the config.
    """
    plain = plain_config(config)
    return bare_checkpoint(plain, source, _tensors(plain, source))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of plain weights, whatever format the release has."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def bare_checkpoint(config: dict[str, Any], source: str, shapes: Mapping[str, Shape]) -> Checkpoint:
    """A checkpoint of headers alone: `shapes` has dtype and shape by name on disk."""
    file = Path(source)
    tensors = {
        name: TensorInfo(file, name, dtype, shape, 0, prod(shape) * ITEM[dtype])
        for name, (dtype, shape) in shapes.items()
    }
    return Checkpoint(file, config, tensors)


def config_dtype(config: Mapping[str, Any], source: str) -> str:
    """The dtype of a config's weights, one of `STORED`.

    Raises:
        CheckpointError: moeflow does not run it.
    """
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if str(dtype) not in STORED:
        raise CheckpointError(f"{source}: dtype is {dtype!r}; supported: {', '.join(STORED)}")
    return str(dtype)


def _tensors(config: Mapping[str, Any], source: str) -> dict[str, Shape]:
    """Name on disk -> dtype and shape, of every tensor of the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    dtype = config_dtype(config, source)
    try:
        with torch.device("meta"):
            built = AutoConfig.for_model(**config)
            model = AutoModelForCausalLM.from_config(built, dtype=getattr(torch, dtype))
        tied = model.all_tied_weights_keys  # stored once, under the other name
        stored = revert_weight_conversion(model, {n: t for n, t in model.state_dict().items() if n not in tied})
    except Exception as error:  # whatever a family's code makes of numbers that do not fit each other
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: transformers cannot build a model of this config: {reason}") from error
    dtypes = {getattr(torch, name): stored for name, stored in STORED.items()}
    return {name: (dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()}


def synthetic_manifest(config: Mapping[str, Any], quantization: Quantization, source: str = "synthetic") -> Manifest:
    """The manifest of the artifact that this model would make; shards are counted without headers.

    Raises:
        CheckpointError: moeflow does not know the family, or transformers refuses the config.
        DocumentError: a group size does not fit the model's dimensions.
    """
    return unpacked_manifest(synthetic_checkpoint(config, source), source, quantization)


def unpacked_manifest(checkpoint: Checkpoint, source: str, quantization: Quantization) -> Manifest:
    """The manifest of the artifact that a checkpoint would make, of what headers tell.

    Raises:
        DocumentError: a group size does not fit the model's dimensions.
    """
    blueprint = Blueprint(checkpoint, source, quantization)
    layers = []
    shards = []
    for position, layer in enumerate(blueprint.checkpoint.layers):
        count = len(layer.experts)
        layers.append(blueprint.expert_layer(position, data_offset=0, digests=[""] * count, relative_error=0.0))
        nbytes = blueprint.blobs_nbytes(position)
        shards.append(Shard(file=blueprint.shard(position), nbytes=nbytes, sha256=""))
    shards.append(Shard(file=RESIDENT_SHARD, nbytes=blueprint.resident_nbytes, sha256=""))
    return blueprint.manifest(layers, shards, resident_error=0.0, files={})
