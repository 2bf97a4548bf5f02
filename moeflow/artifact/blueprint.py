"""The artifact that a checkpoint makes under a quantization, worked out before a byte of it exists.

Names, shapes and schemes decide every layout, so the packer takes them from here and adds what only bytes can
tell (digests, errors, offsets), and a benchmark can describe a model that it has no checkpoint of. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layout import expert_layout, resident_matrix
from moeflow.artifact.schemes import Schemes
from moeflow.schema import (
    BlobLayout,
    ExpertLayer,
    Manifest,
    ModelFacts,
    Quantization,
    ResidentMatrix,
    Scheme,
    Shard,
)

__all__ = ["Blueprint", "RESIDENT_SHARD"]

RESIDENT_SHARD = "resident.safetensors"
_Kind = tuple[int, int, Scheme]


class Blueprint:
    """What one checkpoint becomes under one quantization.

    Raises:
        DocumentError: a group size does not fit the model's dimensions, or a scheme has nothing to apply to.
    """

    def __init__(self, checkpoint: Checkpoint, source: str, quantization: Quantization):
        self.checkpoint = checkpoint
        self.source = source
        self.quantization = quantization
        self._schemes = Schemes(checkpoint, quantization)
        kinds = dict.fromkeys(map(self._kind, range(len(checkpoint.layers))))
        self._layouts: dict[_Kind, BlobLayout] = {
            kind: expert_layout(*kind, checkpoint.dtype, checkpoint.family.biased) for kind in kinds
        }
        self.resident: dict[str, ResidentMatrix] = {}
        """Resident matrices that are quantized, by parameter name."""
        for name, (role, scheme) in self._schemes.resident.items():
            rows, columns = checkpoint.tensors[checkpoint.resident[name]].shape
            self.resident[name] = resident_matrix(role, name, rows, columns, scheme, checkpoint.dtype)

    def _kind(self, position: int) -> _Kind:
        """What decides the layout of the MoE layer at `position`."""
        layer = self.checkpoint.layers[position]
        return layer.hidden, layer.intermediate, self._schemes.experts(position)

    @property
    def layouts(self) -> tuple[BlobLayout, ...]:
        """One per shape and scheme of experts, in the order in which layers meet them."""
        return tuple(self._layouts.values())

    def layout(self, position: int) -> BlobLayout:
        """The blobs of the MoE layer at `position`."""
        return self._layouts[self._kind(position)]

    def shard(self, position: int) -> str:
        """The file of the MoE layer at `position`."""
        width = len(str(len(self.checkpoint.layers) - 1))
        return f"experts-{position:0{width}}.safetensors"

    @cached_property
    def resident_nbytes(self) -> int:
        """Data bytes of the resident shard."""
        checkpoint = self.checkpoint
        packed = sum(matrix.nbytes for matrix in self.resident.values())
        dense = (checkpoint.tensors[n].nbytes for name, n in checkpoint.resident.items() if name not in self.resident)
        return packed + sum(dense)

    def expert_layer(
        self, position: int, data_offset: int, digests: Sequence[str], relative_error: float
    ) -> ExpertLayer:
        """The manifest's entry for the MoE layer at `position`."""
        layer, family = self.checkpoint.layers[position], self.checkpoint.family
        return ExpertLayer(
            module=family.module.format(layer=layer.index),
            router=family.router.format(layer=layer.index),
            experts=len(layer.experts),
            layout=self.layouts.index(self.layout(position)),
            shard=self.shard(position),
            data_offset=data_offset,
            digests=tuple(digests),
            relative_error=relative_error,
        )

    def manifest(
        self, layers: Sequence[ExpertLayer], shards: Sequence[Shard], resident_error: float, files: Mapping[str, str]
    ) -> Manifest:
        """The whole manifest; `shards` are the layers' files, then the resident one."""
        return Manifest(
            model=self._facts(),
            quantization=self.quantization,
            layouts=self.layouts,
            layers=tuple(layers),
            resident_shard=RESIDENT_SHARD,
            resident=tuple(self.resident.values()),
            resident_error=resident_error,
            resident_nbytes=self.resident_nbytes,
            shards=tuple(shards),
            files=dict(files),
        )

    def _facts(self) -> ModelFacts:
        checkpoint = self.checkpoint
        return ModelFacts(
            source=self.source,
            revision=checkpoint.revision,
            type=checkpoint.family.model_type,
            source_digest=checkpoint.digest(),
            dtype=checkpoint.dtype,
            parameters=checkpoint.parameters(),
            expert_parameters=checkpoint.parameters(experts_only=True),
            top_k=checkpoint.top_k,
            kv_values_per_token=checkpoint.kv_values_per_token,
            max_context=checkpoint.max_context,
        )
