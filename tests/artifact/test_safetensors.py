"""Our container against the safetensors library, and against files that are cut, extended or garbage."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moeflow.artifact.safetensors import read_header, read_tensor, shard_writer
from moeflow.errors import ArtifactError, CheckpointError, MoeflowError, StorageError

PAGE = 4096
ENTRIES: list[tuple[str, str, tuple[int, ...]]] = [
    ("layers.0.experts.0", "U8", (5000,)),
    ("a.words", "I32", (3, 7)),
    ("a.scales", "F16", (3, 2, 2)),
    ("norm", "BF16", (9,)),
    ("größe", "F32", ()),
    ("empty", "F32", (0, 4)),
]
DTYPES = {"U8": torch.uint8, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _content(dtype: str, shape: tuple[int, ...]) -> bytes:
    return os.urandom(torch.empty(shape, dtype=DTYPES[dtype]).nbytes)


def _write(path: Path, entries: list[tuple[str, str, tuple[int, ...]]]) -> tuple[list[bytes], object]:
    contents = [_content(dtype, shape) for _, dtype, shape in entries]
    with shard_writer(path, entries) as writer:
        for content in contents:
            writer.write(memoryview(content))
    return contents, writer


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_the_safetensors_library_reads_what_was_written(tmp_path: Path) -> None:
    contents, _ = _write(tmp_path / "a.safetensors", ENTRIES)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as reader:
        assert set(reader.keys()) == {name for name, _, _ in ENTRIES}
        for (name, dtype, shape), content in zip(ENTRIES, contents, strict=True):
            tensor = reader.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[dtype], shape)
            assert _bytes(tensor) == content


@pytest.mark.parametrize("count", [0, 1, 40, 60, 61, 62, 63, 64, 65, 400])
def test_data_starts_on_a_page_however_long_the_header(tmp_path: Path, count: int) -> None:
    entries = [(f"layers.0.experts.{i}", "U8", (16,)) for i in range(count)]
    contents, writer = _write(tmp_path / "a.safetensors", entries)
    assert writer.data_offset % PAGE == 0
    assert (tmp_path / "a.safetensors").read_bytes()[writer.data_offset :] == b"".join(contents)
    header = read_header(tmp_path / "a.safetensors", ArtifactError)
    assert header.data_offset == writer.data_offset


def test_data_starts_on_a_page_when_the_header_just_fits_or_just_does_not(tmp_path: Path) -> None:
    """Names of every length around the one where length field and text fill the first page exactly."""
    offsets = set()
    for length in range(4000, 4060):
        _, writer = _write(tmp_path / "a.safetensors", [("n" * length, "U8", (16,))])
        assert writer.data_offset % PAGE == 0
        assert read_header(tmp_path / "a.safetensors", ArtifactError).data_offset == writer.data_offset
        offsets.add(writer.data_offset)
    assert offsets == {PAGE, 2 * PAGE}


def test_the_digests_are_those_of_file_and_tensors(tmp_path: Path) -> None:
    contents, writer = _write(tmp_path / "a.safetensors", ENTRIES)
    raw = (tmp_path / "a.safetensors").read_bytes()
    shard = writer.shard()
    assert (shard.file, shard.nbytes) == ("a.safetensors", len(raw))
    assert shard.sha256 == hashlib.sha256(raw).hexdigest()
    assert writer.digests == [hashlib.sha256(content).hexdigest() for content in contents]


def test_a_header_tells_where_each_tensor_is(tmp_path: Path) -> None:
    contents, _ = _write(tmp_path / "a.safetensors", ENTRIES)
    raw = (tmp_path / "a.safetensors").read_bytes()
    tensors = read_header(tmp_path / "a.safetensors", ArtifactError).tensors
    assert list(tensors) == [name for name, _, _ in ENTRIES]
    for (name, dtype, shape), content in zip(ENTRIES, contents, strict=True):
        info = tensors[name]
        assert (info.file, info.name, info.dtype, info.shape) == (tmp_path / "a.safetensors", name, dtype, shape)
        assert raw[info.offset : info.offset + info.nbytes] == content


def test_files_of_the_library_are_read_equally(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(4, dtype=torch.int64)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "a.safetensors", CheckpointError).tensors
    assert set(infos) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(infos[name]), tensor)


def test_an_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), shard_writer(tmp_path / "a.safetensors", ENTRIES) as writer:
        writer.write(memoryview(_content(*ENTRIES[0][1:])))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_shard_with_tensors_missing_has_no_digest(tmp_path: Path) -> None:
    with shard_writer(tmp_path / "a.safetensors", ENTRIES) as writer:
        writer.write(memoryview(_content(*ENTRIES[0][1:])))
        with pytest.raises(AssertionError, match="promises more"):
            writer.shard()


def test_a_tensor_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="7 bytes, header says 5000"),
        shard_writer(tmp_path / "a.safetensors", ENTRIES) as writer,
    ):
        writer.write(memoryview(bytes(7)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ArtifactError, CheckpointError])
@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_cut_file_is_told_with_both_sizes(tmp_path: Path, error: type[MoeflowError], cut: int) -> None:
    path = tmp_path / "a.safetensors"
    _write(path, ENTRIES)
    size = path.stat().st_size
    os.truncate(path, size - cut)
    with pytest.raises(error) as caught:
        read_header(path, error)
    assert str(caught.value) == f"{path}: truncated: its tensors need {size} bytes, the file has {size - cut}"


def test_an_extended_file_is_told_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _write(path, ENTRIES)
    size = path.stat().st_size
    os.truncate(path, size + 3)
    with pytest.raises(ArtifactError) as caught:
        read_header(path, ArtifactError)
    assert str(caught.value) == f"{path}: too long: its tensors need {size} bytes, the file has {size + 3}"


@pytest.mark.parametrize("size", [8, 9, 4095])
def test_a_file_cut_in_its_header_is_told_with_both_sizes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    _write(path, ENTRIES)
    os.truncate(path, size)
    with pytest.raises(ArtifactError, match=f"its header needs 4096 bytes, the file has {size}"):
        read_header(path, ArtifactError)


GARBAGE = {
    "nothing": b"",
    "less than a length": b"\x01\x00\x00",
    "a huge length": b"\xff" * 64,
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "not UTF-8": (4).to_bytes(8, "little") + b"\xff\xfe\x00\x01",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "a number": (1).to_bytes(8, "little") + b"7",
    "depth": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "HTML": b"<!DOCTYPE html><html><body>Access denied</body></html>",
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_the_callers_error_and_names_the_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GARBAGE[case])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
        read_header(path, CheckpointError)


@pytest.mark.parametrize(
    "entry",
    [
        None, 7, [], {}, {"dtype": "F32", "shape": [2]}, {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]}, {"dtype": "F32", "shape": [2], "data_offsets": "ab"},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, {"dtype": "F32", "shape": [2], "data_offsets": [-8, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_an_impossible_entry_is_refused(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"good": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "bad": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
        read_header(path, CheckpointError)


def test_whatever_is_flipped_in_a_header_gives_no_other_error(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()}, path)
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(draw.randrange(1, 3)):
            damaged[draw.randrange(end)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            infos = read_header(path, CheckpointError).tensors
            for info in infos.values():
                read_tensor(info)
        except CheckpointError as error:
            assert str(path) in str(error)


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read: no such file"):
        read_header(tmp_path / "a.safetensors", ArtifactError)
