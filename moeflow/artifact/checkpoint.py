"""Reads Hugging Face checkpoints: what is in them at once, their tensors one at a time, never the whole model.

Only safetensors are read: no pickle, no remote code. Headers are read without torch, so that sizes can be
planned before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from moeflow.artifact.facts import ModelConfig
from moeflow.artifact.families import FAMILIES, Family
from moeflow.artifact.layers import MoeLayer, Slice, find_layers
from moeflow.artifact.safetensors import TensorInfo, read_header, read_tensor
from moeflow.errors import CheckpointError
from moeflow.files import read_document

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "resolve_model"]

DEMO = "demo"
_DTYPES: Mapping[str, Literal["float32", "bfloat16", "float16"]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The directory of a checkpoint: `demo`, a local directory, or a hub id, which is downloaded into the hub cache.

    Raises:
        CheckpointError: there is no such model, or the hub cannot be reached.
    """
    if model == DEMO:
        return Path(__file__).parent.parent / "demo"
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(
            f"{model}: no such directory; a model is a directory, a hub id such as "
            "mistralai/Mixtral-8x7B-Instruct-v0.1, or 'demo'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*", "README.md"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model}: neither a local directory nor in the hub cache, and the hub cannot be reached; "
            "download it where there is a network, and name the directory"
        ) from error
    except (HfHubHTTPError, ValueError) as error:
        raise CheckpointError(f"{model}: the hub refuses it: {str(error).splitlines()[0]}") from error


class Checkpoint:
    """A checkpoint directory, opened: config, family, tensor headers; tensors on demand."""

    def __init__(self, directory: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]):
        self.directory = directory
        self.config = config
        self.tensors = tensors
        self.facts = ModelConfig(config, directory / "config.json")

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read config and headers.

        Raises:
            CheckpointError: no config, no safetensors, a missing or truncated shard, an unknown model type.
        """
        config_file = directory / "config.json"
        if not config_file.is_file():
            raise CheckpointError(f"{directory}: not a checkpoint: it has no config.json")
        config = read_document(config_file)
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_file}: a config is a mapping of keys, this is {type(config).__name__}")
        files = _weight_files(directory)
        tensors = {name: info for file in files for name, info in read_header(file, CheckpointError).tensors.items()}
        checkpoint = cls(directory, config, tensors)
        _check_complete(checkpoint)
        _ = checkpoint.family
        return checkpoint

    @cached_property
    def family(self) -> Family:
        """Names on disk: declared, or read off transformers' model, which needs torch and takes some seconds.

        Raises:
            CheckpointError: the model type is not declared, and transformers' model of it does not fit either.
        """
        declared = FAMILIES.get(str(self.config.get("model_type", "")))
        if declared and any(declared.expert_tensor(name) for name in self.tensors):
            return declared
        from moeflow.artifact.discovery import discover

        try:
            return discover(self.directory, list(self.tensors))
        except CheckpointError:
            if declared:  # what is missing is said in its names
                return declared
            raise

    @cached_property
    def layers(self) -> tuple[MoeLayer, ...]:
        """MoE layers in order.

        Raises:
            CheckpointError: an expert lacks a matrix, or experts of one layer differ in shape.
        """
        facts = self.facts
        found = find_layers(self.tensors, self.family, facts.layers, facts.experts, self.directory)
        for index in set(range(facts.layers)) - {layer.index for layer in found}:
            router = f"{self.family.router.format(layer=index)}."
            if self.family.router and any(name.startswith(router) for name in self.resident):
                raise CheckpointError(
                    f"{self.directory}: layer {index} has a router and no experts; the download may be incomplete"
                )
        return found

    @cached_property
    def resident(self) -> dict[str, str]:
        """Parameter name in transformers' model -> tensor name on disk, for all that is not an expert."""
        names = (n for n in self.used if not self.family.expert_tensor(n))
        return {self.family.resident_name(n): n for n in sorted(names)}

    @cached_property
    def used(self) -> tuple[str, ...]:
        """Tensors that transformers' model has a place for."""
        return tuple(n for n in self.tensors if not self.family.is_unused(n, self.facts.layers))

    @cached_property
    def dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """The experts' dtype, which the whole checkpoint is taken to have."""
        name = self.layers[0].experts[0]["down"].tensor
        stored = self.tensors[name].dtype
        if stored not in _DTYPES:
            raise CheckpointError(f"{self.directory}: {name} is stored as {stored}; supported: {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    @property
    def top_k(self) -> int:
        """Experts that the router chooses per token."""
        return self.facts.top_k

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values that one token adds to the cache, over all layers."""
        return self.facts.kv_values_per_token

    @property
    def max_context(self) -> int:
        """Positions that the model was made for."""
        return self.facts.max_context

    def parameters(self, experts_only: bool = False) -> int:
        """Count of numbers in the model, or in its experts."""
        chosen = (n for n in self.used if not experts_only or self.family.expert_tensor(n))
        return sum(prod(self.tensors[n].shape) for n in chosen)

    def digest(self) -> str:
        """SHA-256 over the config and every tensor's name, dtype and shape: the same on every machine."""
        headers = {name: [info.dtype, list(info.shape)] for name, info in sorted(self.tensors.items())}
        return hashlib.sha256(json.dumps([self.config, headers], sort_keys=True).encode()).hexdigest()

    def fingerprint(self, names: list[str]) -> list[Any]:
        """What tells on this machine whether the stored bytes of these tensors may have changed."""
        stats = {self.tensors[n].file: self.tensors[n].file.stat() for n in names}
        files = [[f.name, s.st_size, s.st_mtime_ns] for f, s in sorted(stats.items())]
        return [files, [[n, self.tensors[n].offset] for n in names]]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in host memory, as stored."""
        return read_tensor(self.tensors[name])

    def read_slice(self, part: Slice) -> torch.Tensor:
        """One array of one expert, in host memory: a matrix `[outputs, inputs]`, or a bias `[outputs]`."""
        tensor = read_tensor(self.tensors[part.tensor], part.expert)
        return tensor.T.contiguous() if part.transposed else tensor


def _weight_files(directory: Path) -> list[Path]:
    index_file = directory / "model.safetensors.index.json"
    if index_file.is_file():
        named = sorted(set(_weight_map(index_file).values()))
        missing = [name for name in named if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory}: {len(missing)} of {len(named)} weight files are missing, first {missing[0]}; "
                "resume the download"
            )
        return [directory / name for name in named]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors file; other formats are not read")
    return files


def _weight_map(index_file: Path) -> dict[str, str]:
    index = read_document(index_file)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index_file}: has no weight_map of tensor names to files; fetch it again")
    return found


def _check_complete(checkpoint: Checkpoint) -> None:
    """Compare the tensors found with the index, where there is one."""
    index_file = checkpoint.directory / "model.safetensors.index.json"
    if not index_file.is_file():
        return
    missing = set(_weight_map(index_file)) - set(checkpoint.tensors)
    if missing:
        raise CheckpointError(
            f"{checkpoint.directory}: {len(missing)} tensors of the index are in no file, first {min(missing)}"
        )
