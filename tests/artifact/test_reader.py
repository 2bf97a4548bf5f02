"""Opening and verifying: nothing missing, cut or flipped goes unnoticed, and the place is named."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moeflow.artifact.reader import REPAIR, Artifact
from moeflow.errors import ArtifactError, DocumentError, StorageError
from moeflow.schema import Manifest

EXPERTS = [(layer, expert) for layer in range(2) for expert in range(8)]


def _flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))


def _draw() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


# -- opening -----------------------------------------------------------------------------------------------


def test_an_artifact_opens_and_is_whole(tiny_artifact: Path) -> None:
    artifact = Artifact.open(str(tiny_artifact))
    assert artifact.manifest == Manifest.load(tiny_artifact / "manifest.json")
    assert list(artifact.verify()) == []


@pytest.mark.parametrize("place", [".", "nowhere"])
def test_a_directory_without_manifest_is_no_artifact(tmp_path: Path, place: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(tmp_path / place)
    assert str(caught.value) == f"{tmp_path / place}: no manifest.json: not an artifact"


def test_an_interrupted_pack_says_to_pack_again(own_artifact: Path) -> None:
    (own_artifact / "manifest.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(own_artifact)
    assert str(caught.value) == (
        f"{own_artifact}: no manifest.json: packing was interrupted: run `moeflow pack` again, it goes on"
    )


def _names(artifact: Path) -> list[str]:
    manifest = Manifest.load(artifact / "manifest.json")
    return [*(shard.file for shard in manifest.shards), *manifest.files]


def test_every_file_that_is_missing_is_named(own_artifact: Path) -> None:
    for name in _names(own_artifact):
        path = own_artifact / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ArtifactError) as caught:
            Artifact.open(own_artifact)
        assert str(caught.value) == f"{path}: missing; {REPAIR}"
        path.write_bytes(content)
    assert Artifact.open(own_artifact)


@pytest.mark.parametrize("change", [-1, 1, -4096])
def test_every_shard_of_the_wrong_size_is_named_with_both_sizes(own_artifact: Path, change: int) -> None:
    for shard in Manifest.load(own_artifact / "manifest.json").shards:
        path = own_artifact / shard.file
        content = path.read_bytes()
        os.truncate(path, shard.nbytes + change)
        with pytest.raises(
            ArtifactError,
            match="fetch this file again, or mend it with `moeflow pack PROFILE -o DIRECTORY --overwrite`",
        ) as caught:
            Artifact.open(own_artifact)
        assert f"{path}: needs {shard.nbytes} bytes, the file has {shard.nbytes + change}" in str(caught.value)
        path.write_bytes(content)


def test_a_manifest_of_a_newer_format_says_upgrade(own_artifact: Path) -> None:
    manifest = json.loads((own_artifact / "manifest.json").read_text())
    (own_artifact / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2, "new": 1}))
    with pytest.raises(DocumentError, match="format_version is 2; this moeflow reads manifest version 1: upgrade"):
        Artifact.open(own_artifact)


def test_a_cut_manifest_names_the_place(own_artifact: Path) -> None:
    path = own_artifact / "manifest.json"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DocumentError, match=r"manifest\.json:\d+:\d+: not valid JSON"):
        Artifact.open(own_artifact)


# -- reading -----------------------------------------------------------------------------------------------


def test_blobs_are_those_that_safetensors_reads(tiny_artifact: Path) -> None:
    artifact = Artifact.open(tiny_artifact)
    for layer, expert in EXPERTS:
        buffer = bytearray(artifact.manifest.layout_of(layer).nbytes)
        artifact.read_blob(layer, expert, memoryview(buffer))
        with safe_open(artifact.shard_path(layer), framework="pt") as reader:
            name = sorted(reader.keys(), key=lambda n: int(n.rsplit(".", 1)[1]))[expert]
            assert name.endswith(f".{expert}")
            tensor = reader.get_tensor(name)
        assert tensor.numpy().tobytes() == bytes(buffer)
        assert hashlib.sha256(buffer).hexdigest() == artifact.manifest.layers[layer].digests[expert]


def test_blobs_lie_on_pages(tiny_artifact: Path) -> None:
    artifact = Artifact.open(tiny_artifact)
    offsets = [artifact.blob_offset(layer, expert) for layer, expert in EXPERTS]
    assert all(offset % 4096 == 0 for offset in offsets)


def test_a_damaged_blob_is_not_read(own_artifact: Path) -> None:
    draw = _draw()
    artifact = Artifact.open(own_artifact)
    buffer = memoryview(bytearray(artifact.manifest.layouts[0].nbytes))
    for layer, expert in EXPERTS:
        position = artifact.blob_offset(layer, expert) + draw.randrange(buffer.nbytes)
        bit = draw.randrange(8)
        path = artifact.shard_path(layer)
        _flip(path, position, bit)
        with pytest.raises(ArtifactError) as caught:
            artifact.read_blob(layer, expert, buffer)
        assert str(caught.value).startswith(f"{path}: layer {layer}, expert {expert} is damaged (its SHA-256 differs")
        artifact.read_blob(layer, expert, buffer, verify=False)
        artifact.read_blob(layer, (expert + 1) % 8, buffer)
        _flip(path, position, bit)
        artifact.read_blob(layer, expert, buffer)


def test_a_shard_that_shrank_since_it_was_opened_is_not_read(own_artifact: Path) -> None:
    artifact = Artifact.open(own_artifact)
    buffer = memoryview(bytearray(artifact.manifest.layouts[0].nbytes))
    os.truncate(artifact.shard_path(1), artifact.blob_offset(1, 7) + 100)
    artifact.read_blob(1, 6, buffer)
    with pytest.raises(ArtifactError, match=f"ends at 100 of {buffer.nbytes} bytes of expert 7"):
        artifact.read_blob(1, 7, buffer, verify=False)


def test_a_shard_that_vanished_since_it_was_opened_is_a_storage_error(own_artifact: Path) -> None:
    artifact = Artifact.open(own_artifact)
    artifact.shard_path(0).unlink()
    with pytest.raises(StorageError, match="cannot read: no such file"):
        artifact.read_blob(0, 0, memoryview(bytearray(artifact.manifest.layouts[0].nbytes)))


def test_resident_tensors_are_where_the_header_says(tiny_artifact: Path) -> None:
    artifact = Artifact.open(tiny_artifact)
    header = artifact.resident_header()
    raw = (tiny_artifact / "resident.safetensors").read_bytes()
    with safe_open(tiny_artifact / "resident.safetensors", framework="pt") as reader:
        assert set(header.tensors) == set(reader.keys())
        for name, info in header.tensors.items():
            stored = reader.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert raw[info.offset : info.offset + info.nbytes] == stored


# -- verifying ---------------------------------------------------------------------------------------------


def _faults_of_a_flip(artifact: Path, name: str, position: int, bit: int) -> list[str]:
    """What `verify` says with one bit flipped; the bit is put back."""
    _flip(artifact / name, position, bit)
    faults = list(Artifact.open(artifact).verify())
    _flip(artifact / name, position, bit)
    return faults


def test_a_flip_in_any_blob_names_shard_layer_and_expert(own_artifact: Path) -> None:
    draw = _draw()
    artifact = Artifact.open(own_artifact)
    nbytes = artifact.manifest.layouts[0].nbytes
    for layer, expert in EXPERTS:
        start, name = artifact.blob_offset(layer, expert), artifact.shard_path(layer).name
        for place in (0, nbytes - 1, draw.randrange(nbytes)):
            assert _faults_of_a_flip(own_artifact, name, start + place, draw.randrange(8)) == [
                f"{name}: SHA-256 differs from the manifest's (layer {layer}, expert {expert})"
            ]


def test_a_flip_in_any_header_names_the_shard_and_no_expert(own_artifact: Path) -> None:
    draw = _draw()
    for shard in Artifact.open(own_artifact).manifest.shards:
        for position in (0, 7, 8, 4095, *(draw.randrange(4096) for _ in range(4))):
            assert _faults_of_a_flip(own_artifact, shard.file, position, draw.randrange(8)) == [
                f"{shard.file}: SHA-256 differs from the manifest's"
            ]


def test_a_flip_in_any_resident_tensor_names_the_shard(own_artifact: Path) -> None:
    draw = _draw()
    artifact = Artifact.open(own_artifact)
    name = artifact.manifest.resident_shard
    for info in artifact.resident_header().tensors.values():
        position = info.offset + draw.randrange(info.nbytes)
        assert _faults_of_a_flip(own_artifact, name, position, draw.randrange(8)) == [
            f"{name}: SHA-256 differs from the manifest's"
        ]


def test_a_flip_in_any_small_file_names_it(own_artifact: Path) -> None:
    draw = _draw()
    names = list(Artifact.open(own_artifact).manifest.files)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    for name in names:
        size = (own_artifact / name).stat().st_size
        for position in {0, size - 1, draw.randrange(size)}:
            assert _faults_of_a_flip(own_artifact, name, position, draw.randrange(8)) == [
                f"{name}: SHA-256 differs from the manifest's"
            ]


def test_all_faults_are_told_at_once(own_artifact: Path) -> None:
    artifact = Artifact.open(own_artifact)
    for layer, expert in ((0, 1), (0, 6), (1, 3)):
        _flip(artifact.shard_path(layer), artifact.blob_offset(layer, expert) + 9, 4)
    _flip(own_artifact / "LICENSE", 0, 0)
    assert list(artifact.verify()) == [
        "experts-0.safetensors: SHA-256 differs from the manifest's (layer 0, expert 1; layer 0, expert 6)",
        "experts-1.safetensors: SHA-256 differs from the manifest's (layer 1, expert 3)",
        "LICENSE: SHA-256 differs from the manifest's",
    ]


def test_a_small_file_of_another_size_is_found_by_verifying(own_artifact: Path) -> None:
    os.truncate(own_artifact / "tokenizer.json", 0)
    faults = list(Artifact.open(own_artifact).verify())
    assert faults == ["tokenizer.json: SHA-256 differs from the manifest's"]


def test_verifying_reports_bytes(tiny_artifact: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    artifact = Artifact.open(tiny_artifact)
    list(artifact.verify(lambda *report: reports.append(report)))
    total = sum(shard.nbytes for shard in artifact.manifest.shards)
    assert reports[-1][1:] == (total, total)
    assert [r[1] for r in reports] == sorted(r[1] for r in reports)


def test_an_artifact_is_read_without_torch(tiny_artifact: Path) -> None:
    script = (
        "import sys; from moeflow.artifact.reader import REPAIR, Artifact; "
        f"a = Artifact.open({str(tiny_artifact)!r}); "
        "a.read_blob(0, 0, memoryview(bytearray(a.manifest.layouts[0].nbytes))); "
        "sys.exit('torch' in sys.modules or bool(list(a.verify())))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
