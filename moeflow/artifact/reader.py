"""Opens an artifact and checks that it is whole; reads blobs into memory that the caller provides.

Opening compares every file's size with the manifest, which costs nothing. Digests are compared as blobs are
read (`read_blob`), and of everything by `moeflow verify`. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from moeflow.artifact.safetensors import Header, read_header
from moeflow.errors import ArtifactError
from moeflow.files import sha256_file, storage_errors
from moeflow.progress import Progress, silent
from moeflow.schema import Manifest

__all__ = ["Artifact", "MANIFEST", "PLAN", "REPAIR"]

MANIFEST = "manifest.json"
PLAN = "plan.json"


REPAIR = "fetch this file again, or mend it with `moeflow pack PROFILE -o DIRECTORY --overwrite`"


class Artifact:
    """A packed model on disk."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Read the manifest and check that every file is there in full.

        Raises:
            ArtifactError: no manifest (packing was interrupted, or this is no artifact), or a file is missing or
                of the wrong size.
            DocumentError: the manifest is of a newer format or not valid.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        if not path.is_file():
            hint = "not an artifact"
            if (directory / ".moeflow").is_dir():
                hint = "packing was interrupted: run `moeflow pack` again, it goes on"
            elif (directory / "config.json").is_file():
                hint = "this is a checkpoint; name it as the model of a profile and run `moeflow pack`"
            raise ArtifactError(f"{directory}: no {MANIFEST}: {hint}")
        artifact = cls(directory, Manifest.load(path))
        artifact._check_sizes()
        return artifact

    def _check_sizes(self) -> None:
        for shard in self.manifest.shards:
            path = self.directory / shard.file
            if not path.is_file():
                raise ArtifactError(f"{path}: missing; {REPAIR}")
            size = path.stat().st_size
            if size != shard.nbytes:
                raise ArtifactError(
                    f"{path}: needs {shard.nbytes} bytes, the file has {size}: it is truncated or altered; {REPAIR}"
                )
        for name in self.manifest.files:
            if not (self.directory / name).is_file():
                raise ArtifactError(f"{self.directory / name}: missing; {REPAIR}")

    def check_files(self) -> None:
        """Compare config, tokenizer and other small files with their digests.

        Raises:
            ArtifactError: one differs.
        """
        for name, digest in self.manifest.files.items():
            if sha256_file(self.directory / name) != digest:
                raise ArtifactError(f"{self.directory / name}: its SHA-256 differs from the manifest's; {REPAIR}")

    def check_resident(self) -> None:
        """Compare what is always on the device with its digest: one scale that is no number spoils every token.

        Raises:
            ArtifactError: it differs.
        """
        name = self.manifest.resident_shard
        digest = next(shard.sha256 for shard in self.manifest.shards if shard.file == name)
        if sha256_file(self.directory / name) != digest:
            raise ArtifactError(f"{self.directory / name}: damaged (its SHA-256 differs from the manifest's); {REPAIR}")

    def resident_header(self) -> Header:
        """Where the resident tensors are."""
        return read_header(self.directory / self.manifest.resident_shard, ArtifactError)

    def blob_offset(self, layer: int, expert: int) -> int:
        """Where a blob starts in its shard."""
        return self.manifest.layers[layer].data_offset + self.manifest.starts(layer)[expert]

    def shard_path(self, layer: int) -> Path:
        """The file that holds a layer's blobs."""
        return self.directory / self.manifest.layers[layer].shard

    def read_blob(self, layer: int, expert: int, target: memoryview, verify: bool = True) -> None:
        """Read one blob into `target`, which has its size.

        Raises:
            ArtifactError: the bytes do not match the manifest's digest.
        """
        path = self.shard_path(layer)
        with storage_errors(path, "read"), path.open("rb", buffering=0) as stream:
            stream.seek(self.blob_offset(layer, expert))
            done = 0
            while done < target.nbytes:
                count = stream.readinto(target[done:])
                if not count:
                    raise ArtifactError(f"{path}: ends at {done} of {target.nbytes} bytes of expert {expert}")
                done += count
        if verify and hashlib.sha256(target).hexdigest() != self.manifest.layers[layer].digests[expert]:
            raise ArtifactError(
                f"{path}: layer {layer}, expert {expert} is damaged (its SHA-256 differs from the manifest's); {REPAIR}"
            )

    def verify(self, progress: Progress = silent) -> Iterator[str]:
        """Compare every file with its digest; yields one line per fault, naming the file and the experts hit."""
        total = sum(shard.nbytes for shard in self.manifest.shards)
        done = 0
        for shard in self.manifest.shards:
            progress(shard.file, done, total)
            if sha256_file(self.directory / shard.file) != shard.sha256:
                yield f"{shard.file}: SHA-256 differs from the manifest's{self._damaged_experts(shard.file)}"
            done += shard.nbytes
        progress("done", total, total)
        for name, digest in self.manifest.files.items():
            if sha256_file(self.directory / name) != digest:
                yield f"{name}: SHA-256 differs from the manifest's"

    def _damaged_experts(self, file: str) -> str:
        hit = []
        for layer, entry in enumerate(self.manifest.layers):
            if entry.shard != file:
                continue
            buffer = memoryview(bytearray(self.manifest.layout_of(layer).nbytes))
            for expert in range(entry.experts):
                blob = buffer[: self.manifest.layout_of(layer, expert).nbytes]
                self.read_blob(layer, expert, blob, verify=False)
                if hashlib.sha256(blob).hexdigest() != entry.digests[expert]:
                    hit.append(f"layer {layer}, expert {expert}")
        return f" ({'; '.join(hit)})" if hit else ""
