"""Reads Hugging Face checkpoints: what is in them at once, their tensors one at a time, never the whole model.

Only safetensors are read: no pickle, no remote code. Headers are read without torch, so that sizes can be
planned before anything heavy is imported. Weights that were released in 4 or 8 bits appear here as the plain tensors
that they stand for (`moeflow.artifact.formats`).
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
from moeflow.artifact.formats import stored_tensors
from moeflow.artifact.hub import snapshot_revision
from moeflow.artifact.layers import MoeLayer, Slice, find_layers
from moeflow.artifact.safetensors import TensorInfo, read_header
from moeflow.errors import CheckpointError
from moeflow.files import read_document

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint"]

_DTYPES: Mapping[str, Literal["float32", "bfloat16", "float16"]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}


class Checkpoint:
    """A checkpoint directory, opened: config, family, tensor headers; tensors on demand."""

    def __init__(self, directory: Path, config: dict[str, Any], headers: dict[str, TensorInfo]):
        self.directory = directory
        self.config = config
        self.headers = headers
        """What is on disk."""
        self.facts = ModelConfig.of(config, directory)
        self.stored = stored_tensors(config, headers, self.facts.file)
        self.tensors = {name: stored.info for name, stored in self.stored.items()}
        """The same as plain tensors: what a release stores as codes and scales is one here, in 16 or 32 bits."""

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
        checkpoint = cls(directory, config, _headers(directory))
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
    def revision(self) -> str | None:
        """The commit on the hub, where the directory is a snapshot in the hub cache."""
        return snapshot_revision(self.directory)

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
        headers = {name: [info.dtype, list(info.shape)] for name, info in sorted(self.headers.items())}
        return hashlib.sha256(json.dumps([self.config, headers], sort_keys=True).encode()).hexdigest()

    def fingerprint(self, names: list[str]) -> list[Any]:
        """What tells on this machine whether the stored bytes of these tensors may have changed."""
        parts = [part for n in names for part in self.stored[n].parts]
        stats = {part.file: part.file.stat() for part in parts}
        files = [[f.name, s.st_size, s.st_mtime_ns] for f, s in sorted(stats.items())]
        return [files, [[part.name, part.offset] for part in parts]]

    def read(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """One plain tensor, in host memory or on `device`."""
        return self.stored[name].read(device=device)

    def read_slice(self, part: Slice, device: torch.device | None = None) -> torch.Tensor:
        """An array of one expert, in host memory or on `device`: a matrix `[outputs, inputs]` or a bias `[outputs]`."""
        tensor = self.stored[part.tensor].read(part.expert, device)
        return tensor.T.contiguous() if part.transposed else tensor


def _headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor on disk, from the files that the index names, or from all files where there is none."""
    index_file = directory / "model.safetensors.index.json"
    if not index_file.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: no *.safetensors file; other formats are not read")
        return _merged(files, {})
    index = _weight_map(index_file)
    named = sorted(set(index.values()))
    missing = [name for name in named if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(named)} weight files are missing, first {missing[0]}; "
            "resume the download"
        )
    headers = _merged([directory / name for name in named], {n: directory / file for n, file in index.items()})
    absent = set(index) - set(headers)
    if absent:
        raise CheckpointError(
            f"{directory}: {len(absent)} tensors of the index are in no file, first {min(absent)}; "
            "fetch the index and its files again"
        )
    return headers


def _merged(files: list[Path], places: Mapping[str, Path]) -> dict[str, TensorInfo]:
    """The headers of all files; `places` says which of two files is meant where both have a tensor."""
    found: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file, CheckpointError).tensors.items():
            if name in found and name not in places:
                raise CheckpointError(
                    f"{file}: {name} is in {found[name].file.name} too; without an index nothing says which is meant: "
                    "leave one upload in the directory"
                )
            if name not in found or places[name] == file:
                found[name] = info
    return found


def _weight_map(index_file: Path) -> dict[str, str]:
    index = read_document(index_file)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index_file}: has no weight_map of tensor names to files; fetch it again")
    for name, file in found.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(
                f"{index_file}: {name} is said to be in {file}, outside of the checkpoint's directory; fetch it again"
            )
    return found
