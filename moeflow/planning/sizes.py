"""The sizes that planning needs, from a packed model or from a checkpoint that is not packed yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from moeflow.artifact.blueprint import Blueprint, largest_layout
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layout import row_blocks
from moeflow.planning.rates import format_of
from moeflow.schema import (
    BlobLayout,
    DenseScheme,
    HqqScheme,
    Manifest,
    PackedMatrix,
    Quantization,
    ResidentMatrix,
    Scheme,
)

__all__ = ["LayerSize", "ModelSizes", "ITEM_SIZE"]

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
LATENT_TYPES = ("deepseek_v2", "deepseek_v3")  # families with latent attention


@dataclass(frozen=True)
class LayerSize:
    """The experts of one MoE layer."""

    experts: int
    blob_nbytes: int
    """Of an expert's blob, the largest where they differ: what a slot or a landing buffer must hold."""
    largest_matrix: int
    """Numbers in the largest matrix of an expert."""
    hidden: int = 0
    """Inputs and outputs of an expert."""
    inner: int = 0
    """Numbers between its matrices."""
    format: str = "4-bit"
    """Of its weights, as `rates.format_of` names it."""
    layout: int = 0
    """Which of the model's layouts its largest blobs have: the engine keeps landing buffers for each."""
    blobs: tuple[int, ...] = ()
    """Bytes of each expert's blob, where their layouts differ."""

    @classmethod
    def of(cls, numbers: Sequence[int], layouts: Sequence[BlobLayout]) -> Self:
        """Of a layer; `numbers` has the index of each expert's layout."""
        number = largest_layout(numbers, layouts)
        gate_up, down = layouts[number].matrices
        return cls(
            experts=len(numbers),
            blob_nbytes=layouts[number].nbytes,
            largest_matrix=max(map(_numbers, layouts[number].matrices)),
            hidden=gate_up.columns,
            inner=down.columns,
            format=format_of(gate_up.scheme),
            layout=number,
            blobs=tuple(layouts[n].nbytes for n in numbers) if len(set(numbers)) > 1 else (),
        )

    def of_first(self, count: int) -> int:
        """Bytes of the first `count` blobs."""
        return sum(self.blobs[:count]) if self.blobs else count * self.blob_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all blobs: what the layer takes in host memory, on disk, and in a buffer that holds it whole."""
        return self.of_first(self.experts)

    @property
    def weights(self) -> int:
        """Of an expert: gate, up and down."""
        return 3 * self.hidden * self.inner

    @property
    def mean_nbytes(self) -> float:
        """Bytes of a blob on average: what a copy or a product takes, experts being equally likely."""
        return self.nbytes / self.experts


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
    """Numbers that are unpacked at once of the largest quantized resident matrix."""
    largest_attention: int = 0
    """Numbers in the largest of attention's among them, all at once."""
    scratch: int = 8
    """Bytes a number that torch holds at once while it dequantizes an expert's matrix; 0 if it need not."""
    resident_scratch: int = 0
    """The same for resident matrices."""
    embedding: int = 0
    """Of `resident_dense`, bytes of the input embedding, of which a token reads one row; 0 where it is the head too."""
    latent: bool = False
    """Whether attention is DeepSeek's, over latent keys and values."""

    @property
    def read_resident(self) -> int:
        """Resident bytes that every token reads."""
        return self.resident_packed + self.resident_dense - self.embedding

    @property
    def expert_nbytes(self) -> int:
        """All blobs."""
        return sum(layer.nbytes for layer in self.layers)

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Self:
        """Of a packed model."""
        facts = manifest.model
        numbers = [[entry.layout_of(e) for e in range(entry.experts)] for entry in manifest.layers]
        return cls(
            top_k=facts.top_k,
            dtype=facts.dtype,
            kv_values_per_token=facts.kv_values_per_token,
            max_context=facts.max_context,
            embedding=facts.embedding_parameters * ITEM_SIZE[facts.dtype],
            latent=facts.type in LATENT_TYPES,
            **_of_experts(numbers, manifest.layouts),
            **_of_resident(manifest.resident, manifest.resident_nbytes),
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, quantization: Quantization) -> Self:
        """Of a checkpoint as `quantization` would pack it.

        Raises:
            DocumentError: a group size does not fit the model's dimensions, or a scheme has nothing to apply to.
        """
        blueprint = Blueprint(checkpoint, "", quantization)
        return cls(
            top_k=checkpoint.top_k,
            dtype=checkpoint.dtype,
            kv_values_per_token=checkpoint.kv_values_per_token,
            max_context=checkpoint.max_context,
            embedding=blueprint.embedding_parameters * ITEM_SIZE[checkpoint.dtype],
            latent=str(checkpoint.config.get("model_type")) in LATENT_TYPES,
            **_of_experts(blueprint.numbers, blueprint.layouts),
            **_of_resident(blueprint.resident.values(), blueprint.resident_nbytes),
        )


def _of_experts(numbers: Sequence[Sequence[int]], layouts: Sequence[BlobLayout]) -> dict[str, Any]:
    """What `ModelSizes` says of experts, layer by layer: `numbers` has the index of each one's layout."""
    schemes = {matrix.scheme for layout in layouts for matrix in layout.matrices}
    return {"layers": tuple(LayerSize.of(own, layouts) for own in numbers), "scratch": max(map(_scratch, schemes))}


def _of_resident(matrices: Iterable[ResidentMatrix], nbytes: int) -> dict[str, Any]:
    """What it says of all else, `nbytes` together, of which `matrices` are quantized."""
    matrices = list(matrices)
    packed = sum(matrix.nbytes for matrix in matrices)
    return {
        "resident_packed": packed,
        "resident_dense": nbytes - packed,
        "largest_resident": max((_numbers(block) for m in matrices for block in row_blocks(m)), default=0),
        "largest_attention": max((_numbers(m) for m in matrices if m.role == "attention"), default=0),
        "resident_scratch": max((_scratch(m.scheme) for m in matrices), default=0),
    }


def _numbers(matrix: PackedMatrix) -> int:
    return matrix.rows * matrix.columns


def _scratch(scheme: Scheme) -> int:
    """As `kernels.dequantize` does it: codes are shifted and masked as int32, or bytes become float32 at once."""
    if isinstance(scheme, DenseScheme):
        return 0
    if isinstance(scheme, HqqScheme):
        return 16 if scheme.bits == 3 else 8  # the two planes of 3 bits are joined when both are unpacked
    return 8 if scheme.format == "nf4" else 6
