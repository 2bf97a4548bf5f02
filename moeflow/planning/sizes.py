"""The sizes that planning needs, from a packed model or from a checkpoint that is not packed yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layout import expert_layout, packed_matrix
from moeflow.schema import BlobLayout, DenseScheme, HqqScheme, Manifest, PackedMatrix, Quantization, Scheme

__all__ = ["LayerSize", "ModelSizes", "ITEM_SIZE"]

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LayerSize:
    """The experts of one MoE layer."""

    experts: int
    blob_nbytes: int
    largest_matrix: int
    """Numbers in the largest matrix of an expert."""
    hidden: int = 0
    """Inputs and outputs of an expert."""
    inner: int = 0
    """Numbers between its matrices."""

    @classmethod
    def of(cls, experts: int, layout: BlobLayout) -> Self:
        """Of a layer whose experts' blobs are laid out so."""
        gate_up, down = layout.matrices
        return cls(experts, layout.nbytes, max(map(_numbers, layout.matrices)), gate_up.columns, down.columns)


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
    largest_resident: int = 0
    """Numbers in the largest quantized resident matrix."""
    scratch: int = 8
    """Bytes a number that torch holds at once while it dequantizes an expert's matrix; 0 if it need not."""

    @property
    def expert_nbytes(self) -> int:
        """All blobs."""
        return sum(layer.experts * layer.blob_nbytes for layer in self.layers)

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Self:
        """Of a packed model."""
        packed = sum(s.nbytes for m in manifest.resident for s in m.segments)
        facts = manifest.model
        return cls(
            tuple(LayerSize.of(entry.experts, manifest.layout_of(i)) for i, entry in enumerate(manifest.layers)),
            facts.top_k,
            facts.dtype,
            packed,
            manifest.resident_nbytes - packed,
            facts.kv_values_per_token,
            facts.max_context,
            max(map(_numbers, manifest.resident), default=0),
            _scratch(manifest.quantization.experts),
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
            layers.append(LayerSize.of(len(layer.experts), layout))
        packed = dense = largest = 0
        for name, stored in checkpoint.resident.items():
            info = checkpoint.tensors[stored]
            if checkpoint.family.is_attention(name) and not isinstance(quantization.attention, DenseScheme):
                rows, columns = info.shape
                matrix = packed_matrix(name, rows, columns, quantization.attention, checkpoint.dtype)
                packed += sum(segment.nbytes for segment in matrix.segments)
                largest = max(largest, _numbers(matrix))
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
            largest,
            _scratch(quantization.experts),
        )


def _numbers(matrix: PackedMatrix) -> int:
    return matrix.rows * matrix.columns


def _scratch(scheme: Scheme) -> int:
    """As `kernels.dequantize` does it: codes are shifted and masked as int32, or bytes become float32 at once."""
    if isinstance(scheme, DenseScheme):
        return 0
    if isinstance(scheme, HqqScheme):
        return 16 if scheme.bits == 3 else 8  # the two planes of 3 bits are joined when both are unpacked
    return 8 if scheme.format == "nf4" else 6
