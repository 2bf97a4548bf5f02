"""The artifact that a checkpoint makes under a quantization, worked out before a byte of it exists.

Names, shapes and schemes decide every layout, so the packer takes them from here and adds what only bytes can
tell (digests, errors, offsets), and a benchmark can describe a model that it has no checkpoint of. Imports no
torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import prod

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

__all__ = ["Blueprint", "RESIDENT_SHARD", "largest_layout"]

RESIDENT_SHARD = "resident.safetensors"
_Kind = tuple[int, int, Scheme]


def largest_layout(numbers: Iterable[int], layouts: Sequence[BlobLayout]) -> int:
    """Which of `numbers` is the index of the largest layout; of equal ones, the first in `layouts`."""
    return max(sorted(set(numbers)), key=lambda number: layouts[number].nbytes)


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
        by_layer = [self._kinds(position) for position in range(len(checkpoint.layers))]
        kinds = list(dict.fromkeys(kind for kinds in by_layer for kind in kinds))
        self.layouts: tuple[BlobLayout, ...] = tuple(
            expert_layout(*kind, checkpoint.dtype, checkpoint.family.biased) for kind in kinds
        )
        """One per shape and scheme of experts, in the order in which layers and their experts meet them."""
        numbers = {kind: number for number, kind in enumerate(kinds)}
        self.numbers = tuple(tuple(numbers[kind] for kind in kinds) for kinds in by_layer)
        """Index into `layouts` of each expert of each MoE layer."""
        self.resident: dict[str, ResidentMatrix] = {}
        """Resident matrices that are quantized, by parameter name."""
        for name, (role, scheme) in self._schemes.resident.items():
            rows, columns = checkpoint.tensors[checkpoint.resident[name]].shape
            self.resident[name] = resident_matrix(role, name, rows, columns, scheme, checkpoint.dtype)

    def _kinds(self, position: int) -> list[_Kind]:
        """What decides the layout of each expert of the MoE layer at `position`."""
        layer = self.checkpoint.layers[position]
        return [(layer.hidden, layer.intermediate, scheme) for scheme in self._schemes.experts(position)]

    def blobs(self, position: int) -> tuple[BlobLayout, ...]:
        """The layout of each expert's blob in the MoE layer at `position`."""
        return tuple(self.layouts[number] for number in self.numbers[position])

    def blobs_nbytes(self, position: int) -> int:
        """Bytes of all blobs of the MoE layer at `position`."""
        return sum(layout.nbytes for layout in self.blobs(position))

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

    @property
    def embedding_parameters(self) -> int:
        """Numbers in the input embedding; 0 where the output head is the same tensor."""
        resident = self.checkpoint.resident
        if not any(re.search(self.checkpoint.family.head, name) for name in resident):
            return 0
        tables = (stored for name, stored in resident.items() if name.endswith("embed_tokens.weight"))
        return sum(prod(self.checkpoint.tensors[stored].shape) for stored in tables)

    def expert_layer(
        self, position: int, data_offset: int, digests: Sequence[str], relative_error: float
    ) -> ExpertLayer:
        """The manifest's entry for the MoE layer at `position`."""
        layer, family = self.checkpoint.layers[position], self.checkpoint.family
        numbers = self.numbers[position]
        return ExpertLayer(
            module=family.module.format(layer=layer.index),
            router=family.router.format(layer=layer.index),
            experts=len(layer.experts),
            layout=largest_layout(numbers, self.layouts),
            expert_layouts=numbers if len(set(numbers)) > 1 else (),
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
            embedding_parameters=self.embedding_parameters,
        )
