"""What a packed model is: `manifest.json` in an artifact, written last, so that an artifact that has one is whole.

It holds all that another reader needs: which byte of which file is which part of which matrix. Byte order is
little-endian. The bytes are the same for the same checkpoint, settings and kind of device, whenever packed.
"""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from moeflow.schema.base import Document, Part
from moeflow.schema.quantization import Quantization, ResidentRole, Scheme

__all__ = ["Segment", "PackedMatrix", "ResidentMatrix", "BlobLayout", "ExpertLayer", "Shard", "ModelFacts", "Manifest"]

Digest = str


class Segment(Part):
    """One plain array inside a blob or a resident tensor."""

    part: Literal["words", "high", "scales", "meta", "meta_scales", "dense", "bias"]
    """words: packed integers; high: the third bit of 3-bit weights; scales: scale and zero pairs, or scales alone;
    meta: pairs as 8-bit codes; meta_scales: what turns these codes into pairs; dense: 16 or 32 bit numbers; bias:
    what is added to the products."""
    dtype: Literal["uint8", "int32", "float16", "bfloat16", "float32"]
    shape: tuple[int, ...]
    offset: int = Field(ge=0)
    """Bytes from the start of the blob."""
    nbytes: int = Field(ge=0)


class PackedMatrix(Part):
    """A matrix `[rows, columns]` that maps `columns` inputs to `rows` outputs, stored under `scheme`."""

    name: str
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    scheme: Scheme
    segments: tuple[Segment, ...]

    @property
    def bias(self) -> bool:
        """Whether a bias is stored with the matrix."""
        return any(segment.part == "bias" for segment in self.segments)


class ResidentMatrix(PackedMatrix):
    """A quantized matrix that is always on the device."""

    # Left out where it is attention: manifests made when nothing else was quantized keep their digests.
    role: ResidentRole = Field(default="attention", exclude_if=lambda role: role == "attention")
    """What it is in the model."""

    @property
    def nbytes(self) -> int:
        """Stored bytes of all its parts."""
        return sum(segment.nbytes for segment in self.segments)


class BlobLayout(Part):
    """Where the parts of one expert lie in its blob: gate and up first, then down."""

    nbytes: int = Field(ge=1)
    """Size of the blob, a multiple of the page size."""
    matrices: tuple[PackedMatrix, ...]


class ExpertLayer(Part):
    """The experts of one MoE layer, in one shard, blob after blob, each of its own layout's size."""

    module: str
    """The experts module in transformers' model, such as `model.layers.0.mlp.experts`."""
    router: str
    """The router module in transformers' model."""
    experts: int = Field(ge=1)
    layout: int = Field(ge=0)
    """Index into the manifest's `layouts`; where experts differ, of the largest: what holds it holds any of them."""
    # Left out where all are alike: manifests made when they had to be keep their bytes.
    expert_layouts: tuple[int, ...] = Field(default=(), exclude_if=lambda layouts: not layouts)
    """Index of each expert's layout, where they differ."""
    shard: str
    """File name in the artifact."""
    data_offset: int
    """Bytes from the start of the shard to the first blob, a multiple of the page size."""
    digests: tuple[Digest, ...]
    """SHA-256 of each blob."""
    relative_error: float
    """Norm of (dequantized - original) over norm of original, over all matrices of the layer."""

    def layout_of(self, expert: int) -> int:
        """Index of an expert's layout."""
        return self.expert_layouts[expert] if self.expert_layouts else self.layout


class Shard(Part):
    """A data file of the artifact."""

    file: str
    nbytes: int
    sha256: Digest


class ModelFacts(Part):
    """What the planner must know of the model, so that it needs neither torch nor transformers."""

    source: str
    """The model as the profile named it."""
    revision: str | None = Field(default=None, exclude_if=lambda commit: commit is None)
    """The commit that was packed, where the model came from the hub."""
    type: str
    """transformers' model_type."""
    source_digest: Digest
    """SHA-256 over config and tensor headers of the checkpoint."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the checkpoint."""
    parameters: int
    expert_parameters: int
    top_k: int
    kv_values_per_token: int
    """Numbers that the KV cache holds for one token, over all layers."""
    max_context: int
    """Positions that the model was made for."""
    # Left out where it is 0: manifests made before it existed keep their bytes.
    embedding_parameters: int = Field(default=0, exclude_if=lambda count: count == 0)
    """Of the input embedding, of which a token reads one row; 0 where it is the output head as well."""


class Manifest(Document):
    """A packed model."""

    kind: ClassVar[str] = "manifest"

    model: ModelFacts
    quantization: Quantization
    layouts: tuple[BlobLayout, ...]
    layers: tuple[ExpertLayer, ...]
    """MoE layers in the order of execution."""
    resident_shard: str
    """The file of everything that is always on the device."""
    resident: tuple[ResidentMatrix, ...]
    """Resident matrices that are quantized, by parameter name; their segments are tensors `NAME.PART` of the
    shard. Every other tensor of the shard is a parameter as it is."""
    resident_error: float
    """Relative error over the quantized resident matrices, as in `ExpertLayer`."""
    resident_nbytes: int
    """Data bytes of the resident shard."""
    shards: tuple[Shard, ...]
    files: dict[str, Digest]
    """SHA-256 of config, tokenizer and other small files copied from the checkpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """What the parts say of each other."""
        files = {shard.file for shard in self.shards}
        if self.quantization.auto:
            raise ValueError("quantization.experts is bits: auto; a packed model has schemes")
        if not self.layers:
            raise ValueError("layers is empty; a packed model has at least one MoE layer")
        for i, layer in enumerate(self.layers):
            if layer.layout >= len(self.layouts):
                raise ValueError(f"layers.{i}.layout is {layer.layout}; there are {len(self.layouts)} layouts")
            if layer.expert_layouts:
                self._check_expert_layouts(i, layer)
            if len(layer.digests) != layer.experts:
                raise ValueError(f"layers.{i} has {layer.experts} experts and {len(layer.digests)} digests")
            if layer.shard not in files:
                raise ValueError(f"layers.{i}.shard is {layer.shard}; it is not among shards")
        if self.resident_shard not in files:
            raise ValueError(f"resident_shard is {self.resident_shard}; it is not among shards")
        return self

    def _check_expert_layouts(self, number: int, layer: ExpertLayer) -> None:
        place, found = f"layers.{number}.expert_layouts", layer.expert_layouts
        if len(found) != layer.experts:
            raise ValueError(f"{place} has {len(found)} entries; the layer has {layer.experts} experts")
        if (bad := next((i for i in found if not 0 <= i < len(self.layouts)), None)) is not None:
            raise ValueError(f"{place} names layout {bad}; there are {len(self.layouts)} layouts")
        largest = max(self.layouts[i].nbytes for i in found)
        if layer.layout not in found or self.layouts[layer.layout].nbytes != largest:
            raise ValueError(f"layers.{number}.layout is {layer.layout}; it must be the largest of expert_layouts")

    def layout_of(self, layer: int, expert: int | None = None) -> BlobLayout:
        """The blob layout of an expert of the `layer`-th MoE layer; without one, that of the largest."""
        entry = self.layers[layer]
        return self.layouts[entry.layout if expert is None else entry.layout_of(expert)]

    def starts(self, layer: int) -> tuple[int, ...]:
        """Where each blob of the `layer`-th MoE layer starts, in bytes from the first one, then where the last ends.

        Summed up at every call: whoever asks for every expert keeps the answer.
        """
        entry = self.layers[layer]
        sizes = (self.layouts[entry.layout_of(expert)].nbytes for expert in range(entry.experts))
        return tuple(accumulate(sizes, initial=0))

    @property
    def expert_nbytes(self) -> int:
        """Bytes of all blobs."""
        return sum(self.starts(layer)[-1] for layer in range(len(self.layers)))
