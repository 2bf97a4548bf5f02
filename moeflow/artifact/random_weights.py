"""An artifact without files: the shapes of a real model, random packed weights made where they are needed.

For benchmarks of models that no disk here holds. Codes are random bits and scales are of a trained model's size, so
that kernels do the work that real weights give them; the text is noise. Every expert differs from the others.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeflow.artifact.matrix import allocate_blobs, parts_of
from moeflow.artifact.reader import Artifact
from moeflow.artifact.synthetic import synthetic_checkpoint, synthetic_manifest
from moeflow.schema import BlobLayout, PackedMatrix, Quantization

__all__ = ["RandomArtifact"]

DEVIATION = 0.02  # of weights, as models are initialized
TURN = 4096  # bytes by which neighbouring experts' weights are turned against each other


class RandomArtifact(Artifact):
    """Reads like an artifact; what it reads is random."""

    def __init__(self, config: Mapping[str, Any], quantization: Quantization, name: str):
        folder = tempfile.mkdtemp(prefix="moeflow-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        super().__init__(Path(folder), synthetic_manifest(config, quantization, name))
        (self.directory / "config.json").write_text(json.dumps(dict(config)))
        self._checkpoint = synthetic_checkpoint(config, name)
        random = torch.Generator().manual_seed(0)
        self._templates = [self._blob(layout, random) for layout in self.manifest.layouts]

    def check_files(self) -> None:
        """Nothing to compare."""

    def check_resident(self) -> None:
        """Nothing to compare."""

    def read_blob(self, layer: int, expert: int, target: memoryview, verify: bool = True) -> None:  # noqa: ARG002
        """Fill `target` with a blob of the expert's layout."""
        entry = self.manifest.layers[layer]
        number = entry.layout_of(expert)
        blob = torch.frombuffer(target, dtype=torch.uint8)
        blob.copy_(self._templates[number])
        for matrix in self.manifest.layouts[number].matrices:
            for name, part in parts_of(matrix, blob).items():
                if name in ("words", "high"):
                    flat = part.view(-1)
                    shift = (TURN * (1 + expert + layer * entry.experts)) % max(1, flat.numel())
                    source = parts_of(matrix, self._templates[number])[name].view(-1)
                    flat[shift:].copy_(source[: flat.numel() - shift])
                    flat[:shift].copy_(source[flat.numel() - shift :])

    @classmethod
    def _blob(cls, layout: BlobLayout, random: torch.Generator) -> Tensor:
        blob = torch.zeros(layout.nbytes, dtype=torch.uint8)
        for matrix in layout.matrices:
            cls._fill(matrix, blob, random)
        return blob

    @staticmethod
    def _fill(matrix: PackedMatrix, blob: Tensor, random: torch.Generator) -> None:
        """Weights of mean 0 and a deviation near `DEVIATION`, so that hidden states stay in range."""
        bits = getattr(matrix.scheme, "bits", 8)
        middle = (2**bits - 1) / 2
        scale = DEVIATION / ((4**bits - 1) / 12) ** 0.5
        for name, part in parts_of(matrix, blob).items():
            if part.dtype == torch.int32:
                part.random_(-(1 << 31), (1 << 31) - 1, generator=random)
            elif part.dtype == torch.uint8:
                part.random_(0, 256, generator=random)
            elif part.dim() == 3 and part.shape[-1] == 4:  # steps and starts of scales and zeros in 8 bits
                part.copy_(torch.tensor([scale / 512, 0.75 * scale, 0.0, middle]).expand(part.shape))
            elif part.dim() == 3:  # scale and zero
                part.uniform_(0.75 * scale, 1.25 * scale, generator=random)
                part[..., 1::2] = middle
            elif name == "scales":
                part.uniform_(0.75 * scale, 1.25 * scale, generator=random)
            else:
                part.normal_(0.0, DEVIATION, generator=random)

    def resident(
        self, device: torch.device, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Random tensors for all that is always on the device: parameters, and packed matrices' blobs by name.

        The same at every call, so that engines over one artifact can be compared.
        """
        packed = allocate_blobs(self.manifest.resident, device)
        random = torch.Generator().manual_seed(1)
        for matrix in self.manifest.resident:
            blob = torch.zeros(packed[matrix.name].nbytes, dtype=torch.uint8)
            self._fill(matrix, blob, random)
            packed[matrix.name].copy_(blob)
        random = torch.Generator(device).manual_seed(0)
        dense = {}
        for name, stored in self._checkpoint.resident.items():
            if name in packed:
                continue
            tensor = torch.empty(self._checkpoint.tensors[stored].shape, dtype=dtypes[name], device=device)
            if tensor.dim() == 1:
                dense[name] = tensor.fill_(1.0)
            else:  # numbers of 16 bits, as models are published, whatever computes with them
                dense[name] = tensor.normal_(0.0, 0.02, generator=random).bfloat16().to(tensor.dtype)
        return dense, packed
