"""The stages quantize and pack: a checkpoint in, an artifact out, one layer at a time.

Each shard is quantized, written, and then recorded, in this order; the manifest is written when all shards
are. A run that dies loses at most the shard it was at: the next run keeps every shard whose record says that
it was made from the same bytes with the same settings. Nothing that varies from run to run is stored, so an
interrupted and an uninterrupted run on the same kind of device give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeflow import __version__
from moeflow.artifact.blueprint import RESIDENT_SHARD, Blueprint
from moeflow.artifact.card import CARD, model_card
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.overlap import Task, read_ahead
from moeflow.artifact.placement import check_placement
from moeflow.artifact.reader import MANIFEST, PLAN
from moeflow.artifact.records import Records
from moeflow.artifact.shards import Written, write_experts, write_resident
from moeflow.artifact.sources import Source, check_numbers, expert_sources, resident_sources
from moeflow.errors import CapacityError, UsageError
from moeflow.files import atomic_writer, sha256_file, storage_errors, write_text
from moeflow.progress import Progress, silent
from moeflow.quantization.registry import library_version
from moeflow.schema import ExpertLayer, Manifest, Quantization, Scheme, Shard
from moeflow.schema.units import format_size

__all__ = ["Packer"]

# Small files that make the artifact usable, and shareable, without the checkpoint.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "LICENSE*",
)


@dataclass(frozen=True)
class _Unit:
    """One shard to be made."""

    shard: str
    title: str
    key: str
    nbytes: int
    layer: int | None
    """Position of its MoE layer; None for the resident shard."""


class Packer:
    """Packs one checkpoint under one quantization into one directory.

    Raises:
        DocumentError: a group size does not fit the model's dimensions.
        UsageError: the output is the checkpoint's own directory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: str,
        quantization: Quantization,
        output: Path,
        progress: Progress = silent,
    ):
        self.checkpoint = checkpoint
        self.quantization = quantization
        self.output = output
        self.progress = progress
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if output.resolve() == checkpoint.directory.resolve():
            raise UsageError(f"{output}: is the checkpoint itself; choose another directory for the artifact")
        self.records = Records(output / ".moeflow")
        self.blueprint = Blueprint(checkpoint, source, quantization)

    def units(self) -> list[_Unit]:
        """All shards, in the order in which they are made."""
        layers, blueprint = self.checkpoint.layers, self.blueprint
        units = []
        for i in range(len(layers)):
            key = self._layer_key(i)
            nbytes = blueprint.blobs_nbytes(i)
            units.append(_Unit(blueprint.shard(i), f"layer {i + 1} of {len(layers)}", key, nbytes, i))
        names = list(self.checkpoint.resident.values())
        resident = blueprint.resident.values()
        key = self._key(names, [m.model_dump(mode="json") for m in resident], [m.scheme for m in resident])
        nbytes = sum(self.checkpoint.tensors[n].nbytes for n in names)
        return [*units, _Unit(RESIDENT_SHARD, "attention, embeddings, norms", key, nbytes, None)]

    def _layer_key(self, position: int) -> str:
        """Of a layer's experts; where they differ, of every layout and of whose it is."""
        numbers = self.blueprint.numbers[position]
        met = list(dict.fromkeys(numbers))  # their own numbers change with what other layers have
        layouts = [self.blueprint.layouts[number] for number in met]
        settings: Any = [layout.model_dump(mode="json") for layout in layouts]
        settings = settings[0] if len(met) == 1 else [settings, [met.index(number) for number in numbers]]
        schemes = [matrix.scheme for layout in layouts for matrix in layout.matrices]
        return self._key(self.checkpoint.layers[position].tensors, settings, schemes)

    def _key(self, names: list[str], settings: Any, schemes: list[Scheme]) -> str:
        """Equal keys: same stored bytes, settings, kind of device and code, so the same shard."""
        code = [__version__, *(dict.fromkeys(map(library_version, schemes)) or [""])]
        content = [self.checkpoint.fingerprint(names), settings, self.device.type, code]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def finished(self) -> bool:
        """Whether the output holds exactly what `run` would write."""
        path = self.output / MANIFEST
        if not path.is_file() or not all(self.records.load(unit.shard, unit.key) for unit in self.units()):
            return False
        files = {name: hashlib.sha256(content).hexdigest() for name, content in self._companions().items()}
        present = {name: sha256_file(self.output / name) for name in files if (self.output / name).is_file()}
        return present == files and path.read_text() == self._manifest(self.units(), files).to_json()

    def foreign(self) -> bool:
        """Whether the output holds an artifact of another model or other settings."""
        if not (self.output / MANIFEST).is_file():
            return False
        found = Manifest.load(self.output / MANIFEST)
        same = found.quantization == self.quantization and found.layouts == self.blueprint.layouts
        return not same or found.model.source_digest != self.checkpoint.digest()

    def run(self, check: bool = False) -> Manifest:
        """Make what is missing and write the manifest; does nothing where all is there.

        Args:
            check: compare finished shards with their recorded SHA-256 first, and make those anew that differ.

        Raises:
            CheckpointError: a tensor is none of transformers' model, or holds what is no number.
            CapacityError: the disk has less room than the missing shards need.
            StorageError: the directory cannot be written; shards already recorded are kept.
            UsageError: another process is packing into the directory.
        """
        if self.output.is_dir() and not check and self.finished():
            return Manifest.load(self.output / MANIFEST)
        check_placement(self.checkpoint)
        with storage_errors(self.output, "create"):
            self.output.mkdir(parents=True, exist_ok=True)
        self._check_disk(sum(u.nbytes for u in self.units() if not self.records.load(u.shard, u.key)))
        with self.records.lock():
            if check:
                self.records.drop_damaged()
            return Manifest.load(self.output / MANIFEST) if self.finished() else self._run()

    def _run(self) -> Manifest:
        units = self.units()
        missing = [unit for unit in units if not self.records.load(unit.shard, unit.key)]
        total = sum(unit.nbytes for unit in missing)
        if (self.output / MANIFEST).is_file():  # what is usable is not given up for what cannot be finished
            self._check_numbers(missing)
        with storage_errors(self.output / MANIFEST, "replace"):
            for outdated in (MANIFEST, PLAN):  # a plan belongs to its manifest
                (self.output / outdated).unlink(missing_ok=True)
        done = 0
        with read_ahead(self._sources(missing)) as sources:  # the next shard's too, while one is made durable
            for unit in missing:
                self._make(unit, sources, done, total)
                done += unit.nbytes
        self.records.keep_only({unit.shard for unit in units})
        write_text(self.output / CARD, model_card(self.blueprint))  # for people, who may edit it: not in the manifest
        manifest = self._manifest(units, self._copy_companions())
        manifest.save(self.output / MANIFEST)
        return manifest

    def _check_numbers(self, units: list[_Unit]) -> None:
        """Read all that `units` are made of once; much faster than quantizing it."""
        done, total = 0, sum(unit.nbytes for unit in units)
        for unit in units:
            self.progress(f"checking {unit.title}", done, total)
            check_numbers(self.checkpoint, self._tasks(unit, torch.device("cpu")))
            done += unit.nbytes

    def _check_disk(self, needed: int) -> None:
        with storage_errors(self.output, "measure"):
            free = shutil.disk_usage(self.output).free
        if needed > free:
            raise CapacityError(
                f"{self.output}: packing needs {format_size(needed)} more, the disk has {format_size(free)} free; "
                "choose another output, or fewer bits"
            )

    def _sources(self, units: list[_Unit]) -> Iterator[Task[Source]]:
        for unit in units:
            yield from self._tasks(unit, self.device)

    def _tasks(self, unit: _Unit, device: torch.device) -> Iterator[Task[Source]]:
        """Reads all that a shard is made of."""
        if unit.layer is None:
            return resident_sources(self.checkpoint, self.blueprint.resident, device)
        layer, blobs = self.checkpoint.layers[unit.layer], self.blueprint.blobs(unit.layer)
        return expert_sources(self.checkpoint, layer, blobs, device)

    def _make(self, unit: _Unit, sources: Iterator[Source], done: int, total: int) -> None:
        advance = self._advance(unit.title, done, total)
        path = self.output / unit.shard
        if unit.layer is None:
            written = write_resident(path, self.checkpoint, self.blueprint.resident, sources, advance)
        else:
            layer, blobs = self.checkpoint.layers[unit.layer], self.blueprint.blobs(unit.layer)
            written = write_experts(path, self.checkpoint, layer, blobs, self.device, sources, advance)
        self.records.save(unit.shard, unit.key, written.shard, self._note(unit, written))

    def _note(self, unit: _Unit, written: Written) -> dict[str, Any]:
        """What the manifest will say of a shard beside its size and digest."""
        if unit.layer is None:
            return {"relative_error": written.relative_error}
        entry = self.blueprint.expert_layer(unit.layer, written.data_offset, written.digests, written.relative_error)
        return entry.model_dump(mode="json")

    def _entry(self, position: int, note: dict[str, Any]) -> ExpertLayer:
        """A recorded layer. Its layouts are numbered anew: it may have been made when other layers had others."""
        return self.blueprint.expert_layer(position, note["data_offset"], note["digests"], note["relative_error"])

    def _advance(self, title: str, done: int, total: int) -> Callable[[int], None]:
        position = done
        self.progress(title, done, total)

        def advance(nbytes: int) -> None:
            nonlocal position
            position += nbytes
            self.progress(title, position, total)

        return advance

    def _companions(self) -> dict[str, bytes]:
        """Small files of the checkpoint that the artifact carries along."""
        found = {path for pattern in COMPANIONS for path in self.checkpoint.directory.glob(pattern) if path.is_file()}
        contents = {}
        for path in sorted(found):
            with storage_errors(path, "read"):
                contents[path.name] = path.read_bytes()
        return contents

    def _copy_companions(self) -> dict[str, str]:
        digests = {}
        companions = self._companions()
        for pattern in COMPANIONS:  # of an earlier model: its chat template would be used with this one's tokenizer
            for path in self.output.glob(pattern):
                if path.name not in companions:
                    with storage_errors(path, "remove"):
                        path.unlink()
        for name, content in companions.items():
            with atomic_writer(self.output / name) as stream:
                stream.write(content)
            digests[name] = hashlib.sha256(content).hexdigest()
        return digests

    def _manifest(self, units: list[_Unit], files: dict[str, str]) -> Manifest:
        records = [self.records.load(unit.shard, unit.key) for unit in units]
        notes = [record["entry"] for record in records if record]
        shards = [Shard.model_validate(record["shard"]) for record in records if record]
        assert len(shards) == len(units), "every unit was recorded"
        layers = [self._entry(position, note) for position, note in enumerate(notes[:-1])]
        return self.blueprint.manifest(layers, shards, notes[-1]["relative_error"], files)
