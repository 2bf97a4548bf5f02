"""The sizes that planning needs, from a packed model or from a checkpoint that is not packed yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layout import expert_layout, packed_matrix
from moeflow.schema import DenseScheme, Manifest, Quantization

__all__ = ["LayerSize", "ModelSizes", "ITEM_SIZE"]

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LayerSize:
    """The experts of one MoE layer."""

    experts: int
    blob_nbytes: int
    largest_matrix: int
    """Numbers in the largest matrix of an expert."""


@dataclass(frozen=True)
class ModelSizes:
    """A model in bytes."""

    layers: tuple[LayerSize, ...]
    top_k: int
    dtype: str
    """Of the numbers that are not quantized."""
    resident_packed: int
    """Quantized resident bytes."""
    resident_dense: int
    """Other resident bytes, in `dtype`."""
    kv_values_per_token: int
    max_context: int

    @property
    def expert_nbytes(self) -> int:
        """All blobs."""
        return sum(layer.experts * layer.blob_nbytes for layer in self.layers)

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Self:
        """Of a packed model."""
        packed = sum(s.nbytes for m in manifest.resident for s in m.segments)
        layers = []
        for i, entry in enumerate(manifest.layers):
            layout = manifest.layout_of(i)
            largest = max(m.rows * m.columns for m in layout.matrices)
            layers.append(LayerSize(entry.experts, layout.nbytes, largest))
        facts = manifest.model
        return cls(
            tuple(layers),
            facts.top_k,
            facts.dtype,
            packed,
            manifest.resident_nbytes - packed,
            facts.kv_values_per_token,
            facts.max_context,
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, quantization: Quantization) -> Self:
        """Of a checkpoint as `quantization` would pack it.

        Raises:
            DocumentError: a group size does not fit the model's dimensions.
        """
        layers = []
        for layer in checkpoint.layers:
            biased = checkpoint.family.biased
            layout = expert_layout(layer.hidden, layer.intermediate, quantization.experts, checkpoint.dtype, biased)
            largest = max(m.rows * m.columns for m in layout.matrices)
            layers.append(LayerSize(len(layer.experts), layout.nbytes, largest))
        packed = dense = 0
        for name, stored in checkpoint.resident.items():
            info = checkpoint.tensors[stored]
            if checkpoint.family.is_attention(name) and not isinstance(quantization.attention, DenseScheme):
                rows, columns = info.shape
                matrix = packed_matrix(name, rows, columns, quantization.attention, checkpoint.dtype)
                packed += sum(segment.nbytes for segment in matrix.segments)
            else:
                dense += info.nbytes
        return cls(
            tuple(layers),
            checkpoint.top_k,
            checkpoint.dtype,
            packed,
            dense,
            checkpoint.kv_values_per_token,
            checkpoint.max_context,
        )
