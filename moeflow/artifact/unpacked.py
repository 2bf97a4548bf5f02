"""A checkpoint in an artifact's place, for passes over a text before anything is packed: all in its own numbers.

Resident tensors are read when a model is built. Experts are not: whoever runs the passes reads them from the
checkpoint, one at a time, so that memory need not hold them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.reader import Artifact
from moeflow.artifact.synthetic import unpacked_manifest
from moeflow.schema import DenseScheme, Quantization

__all__ = ["UnpackedArtifact"]


class UnpackedArtifact(Artifact):
    """Names and shapes of an artifact of plain numbers; its files are the checkpoint's."""

    def __init__(self, checkpoint: Checkpoint, source: str):
        plain = Quantization(experts=DenseScheme(), attention=DenseScheme())
        super().__init__(checkpoint.directory, unpacked_manifest(checkpoint, source, plain))
        self.checkpoint = checkpoint

    def resident(
        self, device: torch.device, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All that is always on the device, by parameter; nothing of it is packed."""
        read = {name: self.checkpoint.read(stored, device) for name, stored in self.checkpoint.resident.items()}
        return {name: tensor.to(dtypes.get(name)) for name, tensor in read.items()}, {}
